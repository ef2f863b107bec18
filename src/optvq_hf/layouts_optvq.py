"""Where channels stand in what a quantizer takes and returns, and which positions are real."""

import torch

from .solver_inputs import check_tensor


# Layouts by their number of dimensions: with channels last, and with channels second.
LAYOUTS = {
    2: ("(N, {})", "(N, {})"),
    3: ("(B, T, {})", "(B, {}, T)"),
    4: ("(B, H, W, {})", "(B, {}, H, W)"),
    5: ("(B, T, H, W, {})", "(B, {}, T, H, W)"),
}


def channel_axis(ndim: int, channels_first: bool | None) -> int:
    """The axis of channels, or of codes, in a tensor of so many dimensions; by default second in 4 and 5, else last."""
    return 1 if (ndim >= 4 if channels_first is None else channels_first) else -1


def describe_layouts(channels: int, channels_first: bool | None) -> str:
    """The shapes that are taken, for error messages."""
    shapes = (LAYOUTS[ndim][int(channel_axis(ndim, channels_first) == 1)] for ndim in LAYOUTS)
    return " or ".join(shape.format(channels) for shape in shapes)


def check_mask(mask: torch.Tensor, positions: torch.Tensor) -> None:
    """Raises ValueError unless the mask is bool and has the shape of the positions, whose channels are last."""
    check_tensor(mask, "mask")
    if mask.dtype != torch.bool or mask.shape != positions.shape[:-1]:
        raise ValueError(
            f"mask must be bool {tuple(positions.shape[:-1])}, True where a position is real, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )


def at_positions(values: torch.Tensor, shape: torch.Size, mask: torch.Tensor | None, fill: int) -> torch.Tensor:
    """Values (N, C) of the real positions as (*shape, C), with `fill` at the others."""
    if mask is None:
        return values.reshape(*shape, values.shape[-1])
    filled = values.new_full((*shape, values.shape[-1]), fill)
    return filled.index_put((mask,), values)
