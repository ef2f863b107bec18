"""VQGANs of taming-transformers and LlamaGen once more, from their description: names of weights, and the forward pass on them.

Everything follows from names and shapes, as in their checkpoints, and nothing is shared with the package.
"""

from collections.abc import Callable
from itertools import count, takewhile

import torch
from torch.nn import functional as F


Weights = dict[str, torch.Tensor]


class Names:
    """How a library calls the parts of its encoder and decoder."""

    def __init__(
        self, levels: dict[str, str], block: str, attention: str, middle: tuple[str, str, str], reverses: bool
    ):
        self.levels, self.block, self.attention, self.middle, self.reverses = levels, block, attention, middle, reverses

    def level(self, part: str, level: int, num_levels: int) -> str:
        """Name of the level that runs at this position; taming counts the decoder's from the largest map."""
        number = num_levels - 1 - level if part == "decoder" and self.reverses else level
        return f"{part}.{self.levels[part]}.{number}"


TAMING = Names(
    {"encoder": "down", "decoder": "up"}, "block", "attn", ("mid.block_1", "mid.attn_1", "mid.block_2"), True
)
LLAMAGEN = Names(
    {"encoder": "conv_blocks", "decoder": "conv_blocks"}, "res", "attn", ("mid.0", "mid.1", "mid.2"), False
)


# ---- weights ---------------------------------------------------------------------------------------------------------


def make_weights(
    names: Names,
    make: Callable[..., torch.Tensor],
    *,
    channels: int,
    multiplier: list[int],
    num_blocks: int,
    attention: set[int],
    latent_channels: int,
    embed_dim: int,
    num_codes: int,
) -> Weights:
    """All weights of a model; `attention` are levels, 0 the largest map, and `make` gets a shape."""
    weights: Weights = {}

    def layer(name: str, outputs: int, inputs: int, side: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = make(outputs, inputs, side, side), make(outputs)

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = make(width), make(width)

    def resnet(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        layer(f"{name}.conv1", outputs, inputs, 3)
        norm(f"{name}.norm2", outputs)
        layer(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            layer(f"{name}.nin_shortcut", outputs, inputs, 1)

    def attend(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1)

    last = len(multiplier) - 1
    for part in ("encoder", "decoder"):
        is_encoder = part == "encoder"
        order = range(last + 1) if is_encoder else range(last, -1, -1)
        width = channels if is_encoder else channels * multiplier[-1]
        layer(f"{part}.conv_in", width, 3 if is_encoder else latent_channels, 3)
        lowest = channels * multiplier[-1]
        for block, kind in zip(names.middle, (0, 1, 0)):
            attend(f"{part}.{block}", lowest) if kind else resnet(f"{part}.{block}", lowest, lowest)
        for position, level in enumerate(order):
            prefix = names.level(part, position, last + 1)
            for block in range(num_blocks if is_encoder else num_blocks + 1):
                resnet(f"{prefix}.{names.block}.{block}", width, channels * multiplier[level])
                width = channels * multiplier[level]
                if level in attention:
                    attend(f"{prefix}.{names.attention}.{block}", width)
            if position < last:
                layer(f"{prefix}.{'downsample' if is_encoder else 'upsample'}.conv", width, width, 3)
        norm(f"{part}.norm_out", width)
        layer(f"{part}.conv_out", latent_channels if is_encoder else 3, width, 3)
    layer("quant_conv", embed_dim, latent_channels, 1)
    layer("post_quant_conv", latent_channels, embed_dim, 1)
    weights["quantize.embedding.weight"] = make(num_codes, embed_dim)
    return weights


# ---- forward pass ----------------------------------------------------------------------------------------------------


def latents_of(names: Names, weights: Weights, pixels: torch.Tensor) -> torch.Tensor:
    """What the quantizer gets."""
    hidden = _conv(weights, "encoder.conv_in", pixels, padding=1)
    num_levels = _number(weights, f"encoder.{names.levels['encoder']}")
    for level in range(num_levels):
        prefix = names.level("encoder", level, num_levels)
        hidden = _level(names, weights, prefix, hidden)
        if level < num_levels - 1:
            hidden = _conv(weights, f"{prefix}.downsample.conv", F.pad(hidden, (0, 1, 0, 1)), stride=2)
    hidden = _end(weights, "encoder", _middle(names, weights, "encoder", hidden))
    return _conv(weights, "quant_conv", hidden)


def pictures_of(names: Names, weights: Weights, quantized: torch.Tensor) -> torch.Tensor:
    """What becomes of code vectors, or of latents."""
    hidden = _conv(weights, "decoder.conv_in", _conv(weights, "post_quant_conv", quantized), padding=1)
    hidden = _middle(names, weights, "decoder", hidden)
    num_levels = _number(weights, f"decoder.{names.levels['decoder']}")
    for level in range(num_levels):
        prefix = names.level("decoder", level, num_levels)
        hidden = _level(names, weights, prefix, hidden)
        if level < num_levels - 1:
            doubled = hidden.repeat_interleave(2, 2).repeat_interleave(2, 3)
            hidden = _conv(weights, f"{prefix}.upsample.conv", doubled, padding=1)
    return _end(weights, "decoder", hidden)


def nearest_of(codes: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Indices (B, H, W) of the codes with the least squared distance."""
    return (latents[:, None] - codes[None, :, :, None, None]).square().sum(2).argmin(1)


def _number(weights: Weights, prefix: str) -> int:
    return sum(1 for _ in takewhile(lambda i: any(name.startswith(f"{prefix}.{i}.") for name in weights), count()))


def _level(names: Names, weights: Weights, prefix: str, hidden: torch.Tensor) -> torch.Tensor:
    for block in range(_number(weights, f"{prefix}.{names.block}")):
        hidden = _resnet(weights, f"{prefix}.{names.block}.{block}", hidden)
        if f"{prefix}.{names.attention}.{block}.q.weight" in weights:
            hidden = _attend(weights, f"{prefix}.{names.attention}.{block}", hidden)
    return hidden


def _middle(names: Names, weights: Weights, part: str, hidden: torch.Tensor) -> torch.Tensor:
    first, attention, second = (f"{part}.{name}" for name in names.middle)
    hidden = _resnet(weights, first, hidden)
    if f"{attention}.q.weight" in weights:
        hidden = _attend(weights, attention, hidden)
    return _resnet(weights, second, hidden)


def _end(weights: Weights, part: str, hidden: torch.Tensor) -> torch.Tensor:
    return _conv(weights, f"{part}.conv_out", _swish(_norm(weights, f"{part}.norm_out", hidden)), padding=1)


def _resnet(weights: Weights, name: str, inputs: torch.Tensor) -> torch.Tensor:
    hidden = _conv(weights, f"{name}.conv1", _swish(_norm(weights, f"{name}.norm1", inputs)), padding=1)
    hidden = _conv(weights, f"{name}.conv2", _swish(_norm(weights, f"{name}.norm2", hidden)), padding=1)
    if f"{name}.nin_shortcut.weight" in weights:
        inputs = _conv(weights, f"{name}.nin_shortcut", inputs)
    return inputs + hidden


def _attend(weights: Weights, name: str, inputs: torch.Tensor) -> torch.Tensor:
    normed = _norm(weights, f"{name}.norm", inputs)
    query, key, value = (_conv(weights, f"{name}.{part}", normed).flatten(2) for part in "qkv")  # (B, C, N)
    shares = (torch.einsum("bcn,bcm->bnm", query, key) / query.shape[1] ** 0.5).softmax(2)
    attended = torch.einsum("bnm,bcm->bcn", shares, value).reshape(inputs.shape)
    return inputs + _conv(weights, f"{name}.proj_out", attended)


def _swish(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * hidden.sigmoid()


def _norm(weights: Weights, name: str, hidden: torch.Tensor) -> torch.Tensor:
    groups = hidden.unflatten(1, (32, -1))
    variance, mean = torch.var_mean(groups, (2, 3, 4), correction=0, keepdim=True)
    normed = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
    return normed * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def _conv(weights: Weights, name: str, hidden: torch.Tensor, **options: int) -> torch.Tensor:
    return F.conv2d(hidden, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)
