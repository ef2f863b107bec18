"""Compares a configuration with the weights that it is to take, before any memory is allocated."""

from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import nn


def check_shapes(
    model: nn.Module, files: Iterable[str | Path], may_replace_codebook: bool = False, may_lack: bool = True
) -> None:
    """Compares a model that has no memory yet, on the meta device, with the headers of safetensors files.

    Args:
        may_replace_codebook: Whether the codebook may have another shape, because it is made anew.
        may_lack: Whether the files may lack weights, because they are initialised.

    Raises:
        RuntimeError: If a weight has another shape in the files, or is missing there, as transformers does.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name in wanted if shapes.get(name, wanted[name]) != wanted[name]]
    for name in wrong:
        if not (may_replace_codebook and name.startswith("quantizer.")):
            raise RuntimeError(
                f"{name} is {shapes[name]} in its weights, and would be {wanted[name]} with these fields; only a codebook may "
                "be replaced (ignore_mismatched_sizes=True)"
            )
    missing = [name for name in wanted if name not in shapes and "quantizer.ema_" not in name]
    if missing and not may_lack:
        raise RuntimeError(f"its weights lack {', '.join(sorted(missing)[:3])}")
