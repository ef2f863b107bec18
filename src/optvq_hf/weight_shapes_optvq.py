"""Compares a configuration with the weights that it is to take, before any memory is allocated."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn


logger = logging.getLogger(__name__)


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
    missing = [name for name in wanted if name not in shapes and ".ema_" not in name]
    if missing and not may_lack:
        raise RuntimeError(f"its weights lack {', '.join(sorted(missing)[:3])}")


def make_anew(model: Any, mismatched: set[str], missing: set[str]) -> None:
    """Makes codebooks of another shape anew as a whole; where codes or features lack a weight, the running state alone.

    Args:
        model: An [`~modeling_optvq.OptVQModel`].
        mismatched, missing: Names of its weights that a checkpoint has in another shape, or not at all.
    """
    levels = model.quantizer.levels
    if any(key.startswith("quantizer.") for key in mismatched):
        logger.warning(
            "made anew: the codebook of %d codes of width %d, with its projection and running state",
            levels[0].codebook_size,
            levels[0].head_dim,
        )
        for level in levels:
            for module in (level.embedding, level.projection, level):
                model._init_weights(module)
        return
    of_codes = re.compile(r"quantizer\.(levels\.\d+\.)?(embedding|projection)\.|quant_conv\.")
    if lacking := [key for key in missing if of_codes.match(key)]:
        logger.warning("made anew: %s, with the running state of the quantizer", ", ".join(sorted(lacking)))
        for level in levels:
            model._init_weights(level)
