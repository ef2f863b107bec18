"""Several processes on gloo, against one process."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file

from optvq_hf import OptVQQuantizer, ResidualOptVQQuantizer
from optvq_hf.commands import evaluate
from optvq_hf.sinkhorn import sinkhorn_assign


pytestmark = pytest.mark.distributed

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore"}


def make_points():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(600, 8, generator=generator), torch.randn(64, 8, generator=generator)


def solve_shares(rank, cases, folder):
    """All cases in one group: to start processes takes longer than to solve."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(cases[0]))
    torch.set_num_threads(1)
    for number, shares in enumerate(cases):
        torch.save(solve_share(make_points()[0].split(shares)[rank]), f"{folder}/{number}-{rank}.pt")
    dist.destroy_process_group()


def solve_share(mine):
    _, codebook = make_points()
    result = sinkhorn_assign(mine, codebook, process_group=dist.group.WORLD, **SETTINGS)
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=64, dim=8, warm_start=True)
    quantizer(mine[None])
    output = quantizer(mine[None])
    torch.manual_seed(0)
    average = OptVQQuantizer(codebook_size=64, dim=8, use_projection=False, codebook_update="ema")
    average(mine[None])
    for_robust = sinkhorn_assign(
        mine, codebook, process_group=dist.group.WORLD, potentials=result.potentials,
        **{**SETTINGS, "normalization": "robust", "balance": 0.7},
    )  # fmt: skip
    return (
        result._asdict(),
        for_robust._asdict(),
        output.codes,
        output.perplexity,
        quantizer.potentials,
        output.diagnostics["code_counts"],
        average.embedding.weight,
    )


@pytest.mark.parametrize("cases", [[[300, 300], [500, 100], [600, 0]], [[250, 0, 350]]], ids=["two", "three"])
def test_the_union_of_all_features_is_assigned(tmp_path, cases):
    mp.spawn(solve_shares, (cases, str(tmp_path)), nprocs=len(cases[0]))
    features, codebook = make_points()
    expected = sinkhorn_assign(features, codebook, **SETTINGS)
    robust = sinkhorn_assign(
        features, codebook, potentials=expected.potentials, **{**SETTINGS, "normalization": "robust", "balance": 0.7}
    )
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=64, dim=8, warm_start=True)
    quantizer(features[None])
    alone = quantizer(features[None])
    torch.manual_seed(0)
    average = OptVQQuantizer(codebook_size=64, dim=8, use_projection=False, codebook_update="ema")
    average(features[None])
    for number, shares in enumerate(cases):
        results = [torch.load(tmp_path / f"{number}-{rank}.pt") for rank in range(len(shares))]
        for index, solution in ((0, expected), (1, robust)):
            assert torch.equal(torch.cat([result[index]["codes"] for result in results]), solution.codes)
        assert torch.equal(torch.cat([codes for _, _, codes, *_ in results], dim=1), alone.codes)
        for result, of_robust, _, perplexity, potentials, counts, codes_by_average in results:
            torch.testing.assert_close(codes_by_average, average.embedding.weight)
            assert torch.equal(counts, alone.codes.flatten().bincount(minlength=64))  # of all processes, on each
            for name in ("potentials", "scale", "marginal_error"):
                torch.testing.assert_close(result[name], getattr(expected, name), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(of_robust[name], getattr(robust, name), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(perplexity, alone.perplexity)
            torch.testing.assert_close(potentials, quantizer.potentials, rtol=1e-4, atol=1e-4)


def quantize_masked(rank, masks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(masks))
    torch.set_num_threads(1)
    features, _ = make_points()
    x = features.view(len(masks), -1, 10, 8)[rank].clone()
    x[~masks[rank]] = math.nan
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=64, dim=8)
    output = quantizer(x, mask=masks[rank])
    torch.save(
        (output.codes, output.diagnostics["code_counts"], output.loss, quantizer.potentials), f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("shares", [[0.7, 0.2], [0.5, 0.0]])
def test_processes_with_different_masks(tmp_path, shares):
    """Together they assign all real positions; one may have none."""
    masks = [torch.rand(30, 10, generator=torch.Generator().manual_seed(1)) < share for share in shares]
    mp.spawn(quantize_masked, (masks, str(tmp_path)), nprocs=2)
    real = make_points()[0].view(2, 30, 10, 8)[torch.stack(masks)]
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=64, dim=8)
    alone = quantizer(real)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    codes = torch.cat([result[0][mask] for result, mask in zip(results, masks)])
    assert torch.equal(codes, alone.codes)
    for (codes, counts, loss, potentials), mask in zip(results, masks):
        assert (codes[~mask] == -1).all() and loss.isfinite()
        assert torch.equal(counts, alone.diagnostics["code_counts"])
        torch.testing.assert_close(potentials, quantizer.potentials, rtol=1e-4, atol=1e-4)


def quantize_levels(rank, shares, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(shares))
    torch.set_num_threads(1)
    mine = make_points()[0].split(shares)[rank]
    torch.save(list(steps_of_levels(mine, seed=100 * rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def steps_of_levels(features, seed=0):
    """Codes and state after each of some steps, by every cost. The seed is for what levels are used, which rank 0 draws."""
    for number, cost in enumerate(("euclidean", "squared_euclidean", "cosine")):
        settings = {"codebook_update": "ema", "use_projection": False, "warm_start": True, "cost": cost}
        quantizer = ResidualOptVQQuantizer(3, [32, 16, 8], dim=8, num_heads=2, quantizer_dropout=True, **settings)
        generator = torch.Generator().manual_seed(7)
        for level in quantizer.levels:
            level.embedding.weight.data = torch.randn(level.embedding.weight.shape, generator=generator)
        torch.manual_seed(seed + number)
        for _ in range(4):
            codes = quantizer(features).codes
            yield codes, {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def test_levels_of_all_processes_are_those_of_one(tmp_path):
    mp.spawn(quantize_levels, ([550, 50], str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    used = set()
    for (codes, state), *of_ranks in zip(steps_of_levels(make_points()[0]), *results, strict=True):
        assert torch.equal(torch.cat([part for part, _ in of_ranks]), codes)
        used.add((codes[0] >= 0).sum().item() // 2)
        for _, other in of_ranks:
            for name, tensor in state.items():
                torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
    assert len(used) > 1


def launch(*command, processes=2, **variables):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [str(REPOSITORY / command[0]), *command[1:]]
    done = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train(tmp_path):
    """One run of two processes on shares of unequal size: one model, one log of the whole batch."""
    recipe = str(REPOSITORY / "scripts" / "recipes" / "quickstart.yaml")
    flags = ["--batch-size", "16", "--report-to", "none", "--output-dir", str(tmp_path), "--eval-split", "test[:64]"]
    recipe_without_steps = tmp_path / "recipe.yaml"
    recipe_without_steps.write_text(re.sub("max_steps.*", "num_epochs: 2", Path(recipe).read_text()))
    # 175 images: shares of 88 and 87, of which one could hold a batch more than the other in a naive count of 87.5 / 16.
    shown = launch(
        "scripts/train.py",
        "--config",
        str(recipe_without_steps),
        "--train-split",
        "train[:175]",
        *flags,
        ACCELERATE_USE_CPU="true",
    )
    assert shown.count("training 38,185 parameters for 10 steps") == 1
    [entry] = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert entry["step"] == 10 and entry["codebook_usage"] > 20
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert json.loads((tmp_path / "metrics.json").read_text())["num_images"] == 64


def test_two_processes_evaluate(trained_folder, timm_folder, tmp_path):
    """They share the images, of which a whole batch cannot be read, and the result is that of one process."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(20):
        Image.effect_noise((32, 32), 10 + 4 * number).save(images / f"{number:02}.png")
    for number in (4, 5):
        (images / f"{number:02}.png").write_bytes(b"no picture")
    flags = [
        "--model",
        str(trained_folder),
        "--dataset",
        str(images),
        "--eval-split",
        "train",
        "--max-unreadable",
        "0.1",
    ]
    flags += [
        "--assignment",
        "nearest",
        "sinkhorn",
        "--batch-size",
        "2",
        "--metrics",
        "psnr",
        f"fd-timm:local-dir:{timm_folder}",
    ]
    shown = launch("scripts/evaluate.py", *flags, "--output-dir", str(tmp_path / "two"))
    assert shown.count("18 images") == 1 and shown.count("unreadable 2 of 20 images") == 1
    evaluate.main([*flags, "--output-dir", str(tmp_path / "one")])
    two, one = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one"))
    figures = [*one.pop("by_assignment").items()]
    for assignment, metrics in figures:
        of_two = two["by_assignment"][assignment]
        assert of_two.keys() == metrics.keys() and of_two["intervals"].keys() == metrics["intervals"].keys()
        for name, value in metrics.items():
            assert of_two[name] == (value if name == "intervals" else pytest.approx(value, rel=1e-6)), name
    for name in ("images_sha256", "settings_sha256", "num_unreadable", "num_images"):
        assert two[name] == one[name], name
    with Image.open(tmp_path / "two" / "examples.png") as a, Image.open(tmp_path / "one" / "examples.png") as b:
        assert a.size == b.size and a.tobytes() == b.tobytes()
