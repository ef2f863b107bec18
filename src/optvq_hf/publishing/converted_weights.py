"""Makes a model of weights that have other names, after every name, shape, dtype and number is checked."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from ..configuration_optvq import OptVQConfig
from ..modeling_optvq import OptVQModel


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MOST_PROBLEMS = 6


class Autoencoder(NamedTuple):
    """The encoder and decoder of another library, with the codes if there are some.

    Attributes:
        origin: What it is, for the model card.
        fields: Of OptVQConfig; with `codebook_size` if there are codes.
        weights: Tensors by their names in the source, without those that are skipped.
        our_name: Gives the name of a tensor in the model.
        left_out: What of the source has no place in the model.
        notes: One sentence each, for the model card.
        scale: Centre and spread of the latents, where the source states them: one number, or one for each channel.
    """

    origin: str
    fields: dict[str, Any]
    weights: dict[str, torch.Tensor]
    our_name: Callable[[str], str]
    left_out: list[str]
    notes: tuple[str, ...] = ()
    scale: tuple[torch.Tensor, torch.Tensor] = (torch.tensor(0.0), torch.tensor(1.0))


def rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    """A name after all substitutions of a table, pattern -> replacement, in their order."""
    for theirs, ours in table:
        name = re.sub(theirs, ours, name)
    return name


def make_config(fields: dict[str, Any]) -> OptVQConfig:
    """The configuration with these fields, which come from a file of others.

    Raises:
        ValueError: If they do not make one; the message names the field.
    """
    try:
        return OptVQConfig(**fields)
    except (StrictDataclassError, TypeError, OverflowError) as error:
        lines = str(error).splitlines()
        field = re.match(r"Validation error for field '(\w+)'", lines[0])
        reason = lines[-1].strip().removeprefix("ValueError: ")[:300]
        if field and reason.startswith("must "):
            reason = f"{field[1]} {reason}"
        raise ValueError(f"the configuration does not make a model: {reason}") from error


def fill_model(
    config: OptVQConfig,
    weights: dict[str, torch.Tensor],
    our_name: Callable[[str], str],
    start_codebook: Callable[[OptVQModel], None] | None = None,
) -> OptVQModel:
    """Makes a model with these weights, in their dtype, in evaluation mode.

    Args:
        weights: Tensors by their names in the source; those on the meta device have no numbers, and only these are not checked.
        our_name: Gives the name of a tensor in the model.
        start_codebook: Sets the first codes, for weights without a codebook. None takes the codebook from the weights.

    Raises:
        ValueError: If a weight is missing, unknown, duplicate, of a wrong shape or dtype, or not finite; the message lists
            them by their names in the source, and missing ones, which have none there, by those in the model.
    """
    names: dict[str, str] = {}  # ours -> theirs
    for theirs in weights:
        ours = our_name(theirs)
        if names.setdefault(ours, theirs) != theirs:
            raise ValueError(f"the weights hold one tensor twice, as {names[ours]} and {theirs}")
    model = _empty_model(config)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    if start_codebook is not None:
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith("quantizer.")}
    _check(weights, names, wanted)

    # Copies, because the tensors of a file may share memory.
    loaded = {ours: weights[theirs].contiguous().clone() for ours, theirs in names.items()}
    model.load_state_dict(loaded, strict=False, assign=True)
    for level in model.quantizer.levels:
        level.to_empty(device="cpu", recurse=start_codebook is not None)  # a source has no running state
        level.reset_parameters()
    if start_codebook is not None:
        model.quantizer.to(next(iter(loaded.values())).dtype)
        start_codebook(model)
    return model.eval()


def _check(weights: dict[str, torch.Tensor], names: dict[str, str], wanted: dict[str, torch.Size]) -> None:
    if names and not names.keys() & wanted.keys():
        raise ValueError(
            f"the weights are not those of the encoder and decoder: none has a name of theirs, the first is {min(weights)}"
        )
    problems = [f"missing: {name}" for name in wanted if name not in names]
    problems += [f"not known: {names[name]}" for name in names if name not in wanted]
    for name in names.keys() & wanted.keys():
        tensor = weights[names[name]]
        if tensor.shape != wanted[name]:
            problems.append(f"wrong shape: {names[name]} is {tuple(tensor.shape)}, not {tuple(wanted[name])}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"wrong dtype: {names[name]} is {tensor.dtype}")
        elif not tensor.is_meta and not tensor.isfinite().all():
            problems.append(f"NaN or inf: {names[name]}")
    dtypes = sorted({str(weights[theirs].dtype) for theirs in names.values()})
    if not problems and len(dtypes) > 1:
        problems.append(f"several dtypes: {', '.join(dtypes)}")
    if problems:
        shown, more = "; ".join(sorted(problems)[:MOST_PROBLEMS]), len(problems) - MOST_PROBLEMS
        raise ValueError(
            f"the weights do not fit the configuration: {shown}" + (f"; and {more} more" if more > 0 else "")
        )


def _empty_model(config: OptVQConfig) -> OptVQModel:
    """A model on the meta device: no memory is allocated before the shapes are known to fit."""
    try:
        with torch.device("meta"):
            return OptVQModel(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond what a tensor can have
        reason = str(error).splitlines()[0][:300]
        raise ValueError(f"the configuration does not make a model: {reason}") from error


@torch.no_grad()
def draw_codebook(model: OptVQModel, centre: torch.Tensor, spread: torch.Tensor) -> None:
    """Draws the codes of a model without projection from a normal distribution: the same ones every time.

    Args:
        centre, spread: Of the latents, () or (codebook_dim,). The heads, which have the same codes, share theirs. Where latents
            have length 1, so have the codes of all heads together.
    """
    num_heads, width = model.config.num_codebook_heads, model.config.codebook_dim
    centres, spreads = (values.float().expand(width).view(num_heads, -1) for values in (centre, spread))
    centre = centres.mean(dim=0)
    spread = (spreads.square() + (centres - centre).square()).mean(dim=0).sqrt()
    generator = torch.Generator().manual_seed(0)
    for level in model.quantizer.levels:
        weight = level.embedding.weight
        codes = centre + spread * torch.randn(weight.shape, generator=generator)
        weight.copy_(F.normalize(codes, dim=1) / num_heads**0.5 if model.config.normalize_latents else codes)
