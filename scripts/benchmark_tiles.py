"""Measures what images in tiles cost and keep: peak memory, time, equality with whole images, and seams.

    python scripts/benchmark_tiles.py --models plain_cnn --sizes 1024 2048 4096 --tile-size 512

Encodes and decodes one square picture, whole and in tiles, each in a process of its own, with untrained networks: the paper's
plain CNN, a VQGAN whose attention stands where maps are small, and one whose attention is blended. Prints Markdown tables. A
whole picture is skipped where it would need more than `--memory-limit`, by the peak at the size before. Linux alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from optvq_hf import OptVQConfig, OptVQModel


GIGABYTE = 1e9
QUANTIZER = {"codebook_size": 1024, "codebook_dim": 32, "num_codebook_heads": 4}
VQGAN = {"backbone": "vqgan", "base_channels": 32, "num_res_blocks": 1, "latent_channels": 32}
CONFIGS = {
    "plain_cnn": {"backbone": "plain_cnn"},
    "vqgan, f = 8": {**VQGAN, "channel_multiplier": (1, 1, 2, 2), "attn_resolutions": ()},
    "vqgan, f = 4, blended": {**VQGAN, "channel_multiplier": (1, 1, 1), "attn_resolutions": (128,)},
}


def make_model(name: str) -> OptVQModel:
    """An untrained model whose codes are features, so that every picture has codes of its own."""
    torch.manual_seed(0)
    model = OptVQModel(OptVQConfig(image_size=256, use_codebook_projection=False, **QUANTIZER, **CONFIGS[name])).eval()
    latents = model.encode(make_picture(128)).latents
    assert latents is not None
    features = latents.movedim(1, -1).reshape(-1, model.config.head_dim)
    [level] = model.quantizer.levels
    level.embedding.weight.copy_(features[torch.randperm(len(features))[: QUANTIZER["codebook_size"]]])
    return model


def make_picture(size: int) -> torch.Tensor:
    """(1, 3, size, size) in [-1, 1]: shapes of many sizes."""
    generator = torch.Generator().manual_seed(1)
    picture = torch.zeros(1, 3, size, size)
    for side in (8, 32, 128):
        cells = max(1, size // side)
        coarse = torch.rand(1, 3, cells, cells, generator=generator) * 2 - 1
        picture += F.interpolate(coarse, size=(size, size), mode="bilinear") / 2
    return picture.clamp_(-1, 1)


def peak_memory() -> int:
    """Of this process, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


@torch.no_grad()
def run(name: str, size: int, tile_size: int | None, file: str) -> dict:
    """One measurement, in the process of its own that [`measure`] starts; codes and reconstruction go to the file."""
    model, picture = make_model(name), make_picture(size)
    before, start = peak_memory(), time.perf_counter()
    codes = model.encode(picture, return_loss=False, tile_size=tile_size).codes
    encoded = time.perf_counter()
    reconstruction = model.decode(codes=codes, tile_size=tile_size).reconstruction
    times = encoded - start, time.perf_counter() - encoded
    result = {"before": before, "peak": peak_memory(), "encode": times[0], "decode": times[1]}
    torch.save({"codes": codes, "reconstruction": reconstruction}, file)
    return result


def measure(name: str, size: int, tile_size: int | None, file: Path) -> dict:
    words = [sys.executable, __file__, "--run", json.dumps([name, size, tile_size, str(file)])]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def compare(whole: dict, tiled: dict) -> list[str]:
    """Share of codes that differ, largest and mean difference of pixels."""
    differ = (whole["codes"] != tiled["codes"]).double().mean().item()
    error = (whole["reconstruction"] - tiled["reconstruction"]).abs()
    return [f"{100 * differ:.3f} %", f"{error.max().item():.1e}", f"{error.mean().item():.1e}"]


def steps(image: torch.Tensor, tile_size: int) -> list[str]:
    """Mean difference of neighbouring pixels, where two tiles meet and elsewhere; "-" where none meet."""
    if max(image.shape[-2:]) <= tile_size:
        return ["-", "-", "-"]
    found = []
    for axis in (-1, -2):
        step = image.diff(dim=axis).abs().transpose(axis, -1)
        is_border = torch.arange(1, image.shape[axis]) % tile_size == 0
        found.append((step[..., is_border].mean(), step[..., ~is_border].mean()))
    across, elsewhere = torch.tensor(found).mean(dim=0)
    return [f"{across:.4f}", f"{elsewhere:.4f}", f"{across / elsewhere:.3f}"]


def print_table(header: list[str], rows: list[list]) -> None:
    for row in (header, ["-"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="By default all")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="Sides of the picture, rising")
    parser.add_argument("--tile-size", type=int, default=512, help="In pixels; it should divide the sizes")
    parser.add_argument("--memory-limit", type=float, default=6.0, help="Most gigabytes for a whole picture")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(*json.loads(arguments.run))))
        return
    costs, differences, seams = [], [], []
    for name in arguments.models:
        expected = 0.0
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory() as folder:
                outputs = {}
                for tile_size in (None, arguments.tile_size):
                    label = "whole" if tile_size is None else f"{tile_size} px"
                    if tile_size is None and expected > arguments.memory_limit * GIGABYTE:
                        costs.append([name, size, label, f"about {expected / GIGABYTE:.0f} GB, not run", "", ""])
                        expected *= 4
                        continue
                    result = measure(name, size, tile_size, Path(folder, label))
                    outputs[label] = torch.load(Path(folder, label))
                    if tile_size is None:
                        expected = result["before"] + 4 * (result["peak"] - result["before"])
                    shown = [
                        f"{result['peak'] / GIGABYTE:.2f} GB",
                        f"{result['encode']:.0f} s",
                        f"{result['decode']:.0f} s",
                    ]
                    costs.append([name, size, label, *shown])
                    print(*costs[-1], f"({result['before'] / GIGABYTE:.2f} GB before)", file=sys.stderr, flush=True)
            if len(outputs) == 2:
                differences.append([name, size, *compare(*outputs.values())])
                for label, output in outputs.items():
                    seams.append([name, size, label, *steps(output["reconstruction"], arguments.tile_size)])
    print_table(["network", "side", "tiles", "peak memory", "encode", "decode"], costs)
    print_table(["network", "side", "codes that differ", "largest difference", "mean difference"], differences)
    print_table(["network", "side", "tiles", "step at borders", "step elsewhere", "ratio"], seams)


if __name__ == "__main__":
    with torch.no_grad():
        main()
