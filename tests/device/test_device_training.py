"""Training on the device, and on two of them."""

import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from pyarrow import parquet

import optvq_hf
from builders import pixels, plain_config
from grids import slow
from optvq_hf import OptVQModel, OptVQQuantizer
from optvq_hf.sinkhorn import sinkhorn_assign
from optvq_hf.training.arguments import OptimizationArguments
from optvq_hf.training.optimization import Learner, make_optimizer


def pictures(number, size):
    """(number, 1, size, size) in [-1, 1], of the dataset in the package."""
    folder = next(iter(optvq_hf.__path__))
    column = parquet.read_table(f"{folder}/data/fashion_mnist_sample/train.parquet", columns=["image"])["image"]
    opened = (Image.open(io.BytesIO(image["bytes"])).resize((size, size)) for image in column[:number].to_pylist())
    return torch.from_numpy(np.stack([np.asarray(image) for image in opened])).float()[:, None] / 127.5 - 1


@pytest.mark.parametrize("dtype", [None, slow(torch.bfloat16)], ids=str)
def test_loss_decreases_and_codes_are_used(dtype, device, record_property):
    """In 300 steps on a GPU; a CPU takes 60 with smaller images."""
    num_steps, size = (300, 16) if device.type == "cuda" else (60, 8)
    torch.manual_seed(0)
    images = pictures(128, size).to(device)
    model = OptVQModel(plain_config(image_size=size, num_channels=1, codebook_size=64)).to(device).train()
    learner = Learner(make_optimizer(model, 5e-3, 0.05), OptimizationArguments(learning_rate=5e-3), num_steps)
    losses, counts = [], torch.zeros(64, dtype=torch.int64, device=device)
    for step in range(num_steps):
        start = 8 * step % len(images)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            output = model(images[start : start + 8])
        output.loss.backward()
        learner.step()
        losses.append(output.loss.detach())
        if step >= num_steps - 30:
            counts += output.code_counts
    first, last = (torch.stack(part).mean().item() for part in (losses[:10], losses[-10:]))
    usage = (counts > 0).double().mean().item()
    record_property("loss at first and at last", f"{first:.3f}, {last:.3f}")
    record_property("usage (%)", 100 * usage)
    assert last < 0.5 * first and learner.skipped == 0
    assert usage > 0.8


@pytest.mark.parametrize(
    ("channels_last", "mixed_precision", "compile"),
    [
        *((False, mixed_precision, False) for mixed_precision in ("no", "bf16")),
        *(slow(True, mixed_precision, False) for mixed_precision in ("no", "bf16")),
        *(slow(channels_last, "bf16", True) for channels_last in (False, True)),
    ],
)
def test_combinations_of_speed_flags(channels_last, mixed_precision, compile, make_run, device):
    """Each trains, and the first steps have the loss of float32 without any of them."""
    torch._dynamo.reset()
    batches = [pixels(4, 3, 32, 32)] * 4
    run = make_run(batches, 4, {"compile": compile, "mixed_precision": mixed_precision, "channels_last": channels_last})
    plain = OptVQModel(run.model.config).to(device).train()
    plain.load_state_dict(run.model.state_dict())
    expected = plain(batches[0].to(device)).loss.item()
    run.train()
    first, last = (run.log.entries[i] for i in (0, -1))
    assert first["loss"] == pytest.approx(expected, rel=0.05 if mixed_precision == "bf16" else 0.02)
    assert last["step"] == 4 and last["nonfinite_steps"] == 0
    assert ("peak_memory" in last) == (device.type == "cuda")
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


def solve_share(rank, folder):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    features, codebook = torch.randn(600, 8, generator=generator), torch.randn(64, 8, generator=generator)
    mine = features.split([500, 100])[rank].cuda()
    settings = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore"}
    result = sinkhorn_assign(mine, codebook.cuda(), process_group=dist.group.WORLD, **settings)
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=64, dim=8, warm_start=True).cuda()
    quantizer(mine[None])
    saved = (result.codes, result.potentials, quantizer(mine[None]).codes)
    torch.save([tensor.cpu() for tensor in saved], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_gpus_solve_as_one(cuda, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, for NCCL")
    mp.spawn(solve_share, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    generator = torch.Generator().manual_seed(0)
    features, codebook = (torch.randn(number, 8, generator=generator).cuda() for number in (600, 64))
    expected = sinkhorn_assign(features, codebook, epsilon=10.0, iterations=5, normalization="zscore")
    assert torch.equal(torch.cat([codes for codes, *_ in results]), expected.codes.cpu())
    for _, potentials, _ in results:
        torch.testing.assert_close(potentials, expected.potentials.cpu(), rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=64, dim=8, warm_start=True).cuda()
    quantizer(features[None])
    assert torch.equal(torch.cat([codes for *_, codes in results], dim=1), quantizer(features[None]).codes.cpu())
