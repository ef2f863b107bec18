"""The model on the device: codes of the same latents are those of the CPU, latents those of the CPU up to rounding."""

import subprocess
import sys

import pytest
import torch

from builders import make, pixels, plain_config, vqgan_config
from grids import slow
from optvq_hf import OptVQModel


CONFIGS = {"plain_cnn": plain_config(), "vqgan": vqgan_config(codebook_size=512, codebook_dim=4)}


@pytest.fixture(scope="module", params=["plain_cnn", slow("vqgan")])
def models(request, device):
    """The same model on the CPU and on the device."""
    model = make(CONFIGS[request.param])
    return model, make(CONFIGS[request.param]).to(device)


def images(number=8, size=32):
    return pixels(number, 3, size, size)


@torch.no_grad()
def test_encode_and_decode(models, device):
    model, there = models
    expected, found = model.encode(images()), there.encode(images().to(device))
    torch.testing.assert_close(found.latents.cpu(), expected.latents, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.quantizer(found.latents.cpu()).codes, found.codes.cpu())
    decoded = there.decode(codes=expected.codes.to(device)).reconstruction
    torch.testing.assert_close(decoded.cpu(), model.decode(codes=expected.codes).reconstruction, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, slow(torch.float16)], ids=str)
def test_a_training_step_in_channels_last_and_under_autocast(dtype, models, device):
    model = OptVQModel(models[0].config).to(device, memory_format=torch.channels_last).train()
    x = images().to(device, memory_format=torch.channels_last)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        output = model(x)
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad is not None for p in model.parameters()) >= len(list(model.parameters())) - 1


@torch.no_grad()
def test_channels_last_at_inference(models, device):
    _, there = models
    expected = there.encode(images().to(device))
    found = there.encode(images().to(device, memory_format=torch.channels_last))
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_saved_and_loaded(models, device, tmp_path):
    _, there = models
    there.save_pretrained(tmp_path)
    loaded = OptVQModel.from_pretrained(tmp_path).to(device).eval()
    x = images().to(device)
    assert torch.equal(loaded.encode(x).codes, there.encode(x).codes)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)], ids=str)
@torch.no_grad()
def test_share_of_images_whose_codes_depend_on_the_batch(dtype, models, device, record_property):
    """None on a CPU. GPUs choose kernels by the size of the batch, which rounds latents otherwise: measured here.

    The quantizer has no part in it: of the same latents, codes are the same in every batch.
    """
    _, there = models
    there = there.to(dtype)
    try:
        x = images(32).to(device, dtype)
        together = there.encode(x)
        alone = [there.encode(image[None]) for image in x]
        latents, codes = (torch.cat([getattr(one, name) for one in alone]) for name in ("latents", "codes"))
        differ = (codes != together.codes).flatten(1)
        record_property("images whose codes differ (%)", 100 * differ.any(dim=1).double().mean().item())
        record_property("codes that differ (%)", 100 * differ.double().mean().item())
        assert torch.equal(there.quantizer(latents).codes, codes)
        assert not differ.any() or device.type != "cpu"
    finally:
        there.float()


@pytest.mark.parametrize("mode", ["inference", slow("training")])
def test_compiled(mode, models, device, record_property):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = OptVQModel(models[0].config).to(device)
    model.load_state_dict(models[1].state_dict())
    model.train(mode == "training")
    x = images().to(device)
    compiled = torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager")
    if mode == "training":
        output = compiled(x)
        output.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            assert torch.equal(model.quantizer(output.latents.detach()).codes, output.codes)
    else:
        with torch.no_grad():
            output = compiled(x)
            assert torch.equal(model.quantizer(output.latents).codes, output.codes)
            torch.testing.assert_close(output.latents, model.encode(x).latents, rtol=1e-2, atol=1e-3)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    record_property("graph breaks", breaks)
    assert breaks == 0


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------

CAPTURE = """
import sys
import torch
from optvq_hf import OptVQConfig, OptVQModel
from optvq_hf.sinkhorn import nearest_assign, sinkhorn_assign
torch.manual_seed(0)
fields = {"backbone": "plain_cnn", "image_size": 32, "codebook_size": 128, "codebook_dim": 8, "num_codebook_heads": 2}
model = OptVQModel(OptVQConfig(**fields)).cuda().eval()
z, c, x = torch.randn(512, 4).cuda(), torch.randn(128, 4).cuda(), torch.rand(4, 3, 32, 32).cuda()
latents, numbers = model.encode(x).latents, torch.arange(9, device="cuda")
functions = {
    "encoder": lambda: model.quant_conv(model.encoder(x)),
    "decoder": lambda: model._decode(latents),
    "lookup table": lambda: torch.nn.functional.embedding(numbers, model.get_codebook()),
    "nearest_assign": lambda: nearest_assign(z, c),
    "sinkhorn_assign": lambda: sinkhorn_assign(z, c, epsilon=10.0, iterations=5, normalization="zscore").codes,
    "encode": lambda: model.encode(x, return_loss=False).codes,
}
@torch.no_grad()
def capture(function):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(found, expected)

for name in sys.argv[1:]:
    capture(functions[name])
"""


@pytest.mark.parametrize(
    ("what", "must_work"),
    [
        (("encoder", "decoder", "lookup table"), True),
        (("nearest_assign",), False),
        (("sinkhorn_assign",), False),
        (("encode",), False),
    ],
)
def test_cuda_graphs(what, must_work, cuda, record_property):
    """Networks can be captured. Of the assignments it is measured: checks for NaN and rows left open are read by the host."""
    done = subprocess.run([sys.executable, "-c", CAPTURE, *what], capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    record_property(f"{', '.join(what)} in a graph", "yes" if done.returncode == 0 else " ".join(errors)[:200])
    assert done.returncode == 0 or (not must_work and "captur" in done.stderr), done.stderr[-2000:]
