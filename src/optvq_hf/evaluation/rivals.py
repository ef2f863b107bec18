"""Quantizers that are compared with ours, behind one call: latents -> quantized latents, codes, loss.

Those of others are the modules of vector-quantize-pytorch (the extra `compare`) with the settings that their authors or its
documentation advise. Settings after the name change one: `transport,epsilon=10..100,iterations=3`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..quantizer_optvq import OptVQQuantizer
from ..training.arguments import CodebookArguments


# Levels of FSQ for about as many codes (Mentzer et al. 2023, arXiv 2309.15505, table 1; 8,192 and below 256 are ours).
FSQ_LEVELS = {
    16: (4, 4), 64: (4, 4, 4), 256: (8, 6, 5), 1024: (8, 5, 5, 5), 4096: (7, 5, 5, 5, 5), 8192: (8, 8, 8, 16),
    16384: (8, 8, 8, 6, 5), 65536: (8, 8, 8, 5, 5, 5),
}  # fmt: skip


@dataclass(frozen=True)
class Rival:
    """A quantizer and how it is trained.

    Attributes:
        title: In tables and figures.
        make: From the number of codes and their width (and settings of the quantizer), a module of `dim` channels: from
            latents (B, dim, H, W) to quantized ones, codes (B, H, W) or (B, H, W, levels), and a 0-dim loss.
        epsilon, balance: First and last value in training, of our transport.
        codebook_start: `kmeans` for codes from clusters of the first latents, None for the quantizer's own start.
        codebook_multiplier: Learning rate of the codes, as a multiple of that of the networks.
        standardised: Whether the first latents are scaled to mean 0 and variance 1. It keeps plain gradient descent on nearest
            codes from an early collapse; for the others it makes high learning rates unstable.
        normalised: Whether latents keep mean 0 and variance 1, of every channel in a batch, in all of the training (batch
            normalisation without weights). Rounding needs it: where latents leave its range, all get one code and stay there.
        count_tokens: From the number of codes, how many different tokens there are.
    """

    title: str
    make: Callable[..., "Ours | Theirs"]
    epsilon: tuple[float, float] | None = None
    balance: tuple[float, float] | None = None
    codebook_start: str | None = None
    codebook_multiplier: float = 1.0
    standardised: bool = False
    normalised: bool = False
    count_tokens: Callable[[int], int] = int

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the quantizer that differ from its own defaults."""
        return self.make.keywords if isinstance(self.make, partial) else {}

    @property
    def is_ours(self) -> bool:
        return (self.make.func if isinstance(self.make, partial) else self.make) is Ours


class Ours(nn.Module):
    """[`OptVQQuantizer`] as a rival."""

    def __init__(self, codebook_size: int, dim: int, **settings: Any):
        super().__init__()
        self.quantizer = OptVQQuantizer(codebook_size, dim, **settings)
        self.num_codes, self.num_levels, self.dim = codebook_size, 1, dim

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output = self.quantizer(latents)
        return output.quantized, output.codes.squeeze(1), output.loss


class Theirs(nn.Module):
    """A module of vector-quantize-pytorch as a rival.

    Args:
        module: Takes (B, dim, H, W).
        num_codes: Codes of each level.
        dim: Channels that it quantizes.
        num_levels: Levels of a token.
    """

    def __init__(self, module: nn.Module, num_codes: int, dim: int, num_levels: int = 1):
        super().__init__()
        self.module, self.num_codes, self.dim, self.num_levels = module, num_codes, dim, num_levels

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        quantized, codes, *losses = self.module(latents)
        return quantized, codes, sum((loss.sum() for loss in losses), latents.new_zeros(()))


def _library() -> Any:
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise ImportError('vector-quantize-pytorch is not installed: run pip install "optvq_hf[compare]"') from error
    return vector_quantize_pytorch


# What the documentation of vector-quantize-pytorch advises for EMA codes.
ADVISED = {"decay": 0.8, "kmeans_init": True, "kmeans_iters": 10, "threshold_ema_dead_code": 2}


def _ema(codebook_size: int, dim: int, **settings: Any) -> Theirs:
    module = _library().VectorQuantize(dim, codebook_size, accept_image_fmap=True, **{**ADVISED, **settings})
    return Theirs(module, codebook_size, dim)


def _simvq(codebook_size: int, dim: int, **settings: Any) -> Theirs:
    return Theirs(_library().SimVQ(dim, codebook_size, channel_first=True, **settings), codebook_size, dim)


def _fsq(codebook_size: int, dim: int) -> Theirs:
    """A channel for each of its axes, not `dim`."""
    levels = _fsq_levels(codebook_size)
    return Theirs(_library().FSQ(list(levels)), math.prod(levels), len(levels))


def _fsq_levels(codebook_size: int) -> tuple[int, ...]:
    if codebook_size not in FSQ_LEVELS:
        raise ValueError(f"fsq has levels for {', '.join(map(str, FSQ_LEVELS))} codes, got {codebook_size}")
    return FSQ_LEVELS[codebook_size]


def _lfq(codebook_size: int, dim: int) -> Theirs:
    """A channel for each bit, not `dim`."""
    if codebook_size & (codebook_size - 1):
        raise ValueError(f"lfq needs a power of two as the number of codes, got {codebook_size}")
    num_bits, settings = codebook_size.bit_length() - 1, {"entropy_loss_weight": 0.1, "commitment_loss_weight": 0.25}
    return Theirs(_library().LFQ(dim=num_bits, codebook_size=codebook_size, **settings), codebook_size, num_bits)


def _residual(codebook_size: int, dim: int) -> Theirs:
    """Two levels with as many bits together."""
    of_level = round(codebook_size**0.5)
    if of_level**2 != codebook_size:
        raise ValueError(
            f"residual needs a square as the number of codes, for two levels of its root, got {codebook_size}"
        )
    module = _library().ResidualVQ(
        dim=dim, num_quantizers=2, codebook_size=of_level, accept_image_fmap=True, rotation_trick=False, **ADVISED
    )
    return Theirs(module, of_level, dim, num_levels=2)


_nearest = partial(Ours, training_assignment="nearest")
_ema_codes = partial(Ours, codebook_update="ema", ema_decay=0.8, use_projection=False)
RIVALS = {
    "transport": Rival("transport, as in the paper", Ours),
    "transport_ema": Rival("transport, EMA codes", _ema_codes),
    "default": Rival(
        "transport, our default", partial(_ema_codes, commitment_weight=0.25), epsilon=(10, 100), balance=(1, 0.1)
    ),
    "nearest": Rival("nearest codes", _nearest, standardised=True),
    "nearest_kmeans": Rival("nearest codes, k-means start", _nearest, codebook_start="kmeans", standardised=True),
    "ema": Rival("EMA codes, k-means start, restart", partial(_ema, rotation_trick=False)),
    "rotation": Rival("EMA codes, rotation trick", partial(_ema, rotation_trick=True)),
    "simvq": Rival("SimVQ", _simvq, standardised=True),
    "fsq": Rival("FSQ", _fsq, count_tokens=lambda codebook_size: math.prod(_fsq_levels(codebook_size))),
    "lfq": Rival("LFQ", _lfq),
    "residual": Rival("residual VQ, two levels, equal bits", _residual),
}


# Settings that would leave tokens with other bits, or images with other axes, than those of the other rivals.
OF_SHAPES = ("num_heads", "heads", "channels_first", "channel_last")
# Settings of the transport, which nearest codes have no use for.
OF_TRANSPORT = ("epsilon", "balance", "iterations", "normalization")
# How ours is trained: the libraries of others have no such thing.
OF_OURS = ("rate", "start")
# What is done to the latents of any rival.
OF_LATENTS = ("standardised", "normalised")


def find_rival(name: str) -> Rival:
    """The rival of a name, changed by the settings after it, as in `transport,epsilon=10..100,iterations=3`.

    `epsilon=FIRST..LAST` and `balance=FIRST..LAST` are schedules; `rate` multiplies the learning rate for the codes; `start` is
    `kmeans`; these are of ours alone. `standardised` and `normalised` are as in [`Rival`]; all else goes to the quantizer.
    Every setting changes something, so that a title tells what was run.

    Raises:
        ValueError: For an unknown rival, or a setting that is no `name=value`, out of range, or without effect.
    """
    base, *settings = name.split(",")
    if base not in RIVALS:
        raise ValueError(f"unknown rival {base!r}; rivals are {', '.join(RIVALS)}")
    rival, seen = RIVALS[base], set()
    with _errors_of(name):
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not (key and equals and text):
                raise ValueError(f"a setting must be name=value, got {setting!r}")
            if key in seen:
                raise ValueError(f"{key} is set twice")
            seen.add(key)
            rival = _changed(rival, key, text)
        useless = seen & {*OF_TRANSPORT} if _is_nearest(rival) else set()
        if rival.settings.get("codebook_update") == "ema":
            useless |= seen & {"rate"}
        if useless:
            raise ValueError(f"{', '.join(sorted(useless))} would have no effect")
    return replace(rival, title=", ".join([rival.title, *map(_title_of, settings)]))


def _title_of(setting: str) -> str:
    """`ema_decay=0.9` as "ema decay 0.9", `normalised=true` as "normalised"."""
    return setting.removesuffix("=true").replace("=", " ").replace("_", " ")


def make_rival(name: str, codebook_size: int, dim: int) -> Ours | Theirs:
    """The quantizer of a rival; see [`find_rival`].

    Raises:
        ValueError: Beside those of [`find_rival`], for a size or a setting that the quantizer refuses.
        ImportError: If the library of the rival is missing.
    """
    rival = find_rival(name)
    with _errors_of(name):
        return rival.make(codebook_size, dim)


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Messages name the rival. Quantizers refuse unknown settings with TypeError, and libraries wrong ones with assertions."""
    try:
        yield
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"rival {name!r}: {error}") from error


def _changed(rival: Rival, key: str, text: str) -> Rival:
    """The rival with one more setting."""
    schedule = key if key in ("epsilon", "balance") else None
    if key in OF_SHAPES:
        raise ValueError(f"{key} would give other tokens than those of the other rivals")
    if not rival.is_ours and (key in OF_OURS or schedule):
        raise ValueError(f"{key} is a setting of transport and nearest codes alone")
    if schedule and ".." in text:
        values = tuple(_number(key, value) for value in text.split(".."))
        checked: dict[str, Any] = {f"{key}_schedule": list(values)}
        CodebookArguments(**checked)
        return replace(rival, **{key: values})
    if key == "rate":
        if (rate := _number(key, text)) <= 0:
            raise ValueError(f"rate must be greater than 0, got {text}")
        return replace(rival, codebook_multiplier=rate)
    if key == "start":
        if text != "kmeans":
            raise ValueError(f"start must be kmeans, got {text!r}")
        return replace(rival, codebook_start=text)
    if key in OF_LATENTS:
        if text not in BOOLEANS:
            raise ValueError(f"{key} must be true or false, got {text!r}")
        return replace(rival, **{key: BOOLEANS[text]})
    value = _number(key, text) if schedule else _value(key, text)
    if schedule:  # a constant, also where the rival has a schedule
        rival = replace(rival, **{key: None})
    return replace(rival, make=partial(rival.make, **{key: value}))


def _is_nearest(rival: Rival) -> bool:
    assignments = ("training_assignment", "sinkhorn"), ("inference_assignment", "nearest")
    return rival.is_ours and all(rival.settings.get(*assignment) == "nearest" for assignment in assignments)


BOOLEANS = {"true": True, "false": False}


def _value(key: str, text: str) -> Any:
    """An integer, a number, true or false, or a word."""
    if text in BOOLEANS:
        return BOOLEANS[text]
    if text.lower() in ("true", "false", "yes", "no", "on", "off"):
        raise ValueError(f"{key} must be true or false, got {text!r}")
    try:
        return int(text)
    except ValueError:
        pass
    try:
        float(text)
    except ValueError:
        return text
    return _number(key, text)


def _number(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key} must be a finite number, got {text!r}")
    return number
