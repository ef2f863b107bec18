"""Cuts this folder's subset out of the whole set of the original's values: python tests/golden/cut.py WHOLE OUT."""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


# Of three discriminators the smallest; of four models the smallest, as it is trained and as a nearest-neighbour one.
DISCRIMINATOR = "disc_l2_ndf8_c3"
MODELS = ("model_plaincnn_mnist", "model_plaincnn_mnist_basevq")


def is_dropped(name: str) -> bool:
    """What no test reads: float64 runs of the original, margins, images encoded alone."""
    last = name.rpartition("/")[2]
    return last in ("Q64", "margin") or last.endswith("_single")


def cut_tensors(source: Path, target: Path, keep=lambda name: True):
    tensors = {name: tensor for name, tensor in load_file(source).items() if keep(name) and not is_dropped(name)}
    for name, tensor in tensors.items():
        if name.endswith("/Q_exact64"):  # compared to 4 digits
            tensors[name] = tensor.float()
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target)


def cut(whole: Path, out: Path):
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(whole.glob("*.json")):
        content = json.loads(path.read_text())
        if path.stem == "discriminator":
            content["discriminators"] = [case for case in content["discriminators"] if case["id"] == DISCRIMINATOR]
        elif path.stem == "models":
            content = [model for model in content if model["id"] in MODELS]
        (out / path.name).write_text(json.dumps(content, separators=(",", ":")) + "\n")
    for name in ("sinkhorn", "quantizer", "two_ranks"):
        cut_tensors(whole / f"{name}.safetensors", out / f"{name}.safetensors")
    cut_tensors(
        whole / "discriminator.safetensors",
        out / "discriminator.safetensors",
        lambda name: not name.startswith("disc_") or name.startswith(DISCRIMINATOR),
    )
    for model in MODELS:
        for path in sorted((whole / model).glob("*.safetensors")):
            if path.name != "model_hf.safetensors":  # the same weights with a prefix
                cut_tensors(path, out / model / path.name)
        shutil.copyfile(whole / model / "config.json", out / model / "config.json")
    (out / "model_diffusion_small").mkdir(exist_ok=True)  # its weights would fill the folder
    shutil.copyfile(whole / "model_diffusion_small" / "config.json", out / "model_diffusion_small" / "config.json")


if __name__ == "__main__":
    cut(Path(sys.argv[1]), Path(sys.argv[2]))
