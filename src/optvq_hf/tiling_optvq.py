"""Encoder and decoder tile by tile, for pictures whose feature maps do not fit into memory.

A map that is larger than what goes into the network and what comes out of it is never whole in memory: it is computed for
one tile of the picture at a time, with as many positions around it as the layers after it see. At the borders of the picture
these end, so that the zeros there are those of the convolutions. All other maps are whole, and so are the layers between two
of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise, product
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import nn

from .backbone_optvq import OptVQAttentionBlock, OptVQGroupNorm


Span = tuple[int, int]  # along one axis: the first position, and the one after the last
Window = tuple[Span, Span]  # rows and columns

# PyTorch 2.14 gives convolutions of at most so many values another kernel on CPUs, unless the batch has 16 images.
FEW_VALUES, LARGE_BATCH = 20480, 16
# Tiles of networks with attention share a quarter of their side with each neighbour.
PARTS_OF_A_BLENDED_TILE = 4


# ---- geometry --------------------------------------------------------------------------------------------------------


class Resampling(NamedTuple):
    """What a convolution or a change of resolution does to positions along an axis."""

    reach: int = 0  # input positions that an output sees on each side of those it stands for
    stride: int = 1  # input positions for each output
    factor: int = 1  # outputs for each input position

    def source(self, span: Span) -> Span:
        """Input positions that outputs see."""
        first, last = span[0] // self.factor, -(-span[1] // self.factor)
        return first * self.stride - self.reach, last * self.stride + self.reach


def resamplings_of(layer: nn.Module) -> list[Resampling]:
    """Of all modules of a layer, which it runs in the order in which they are registered, or side by side with a 1x1."""
    resamplings = []
    for module in layer.modules():
        if isinstance(module, nn.ConvTranspose2d):
            beyond = max(0, module.kernel_size[0] - module.stride[0])
            resamplings.append(Resampling(reach=-(-beyond // module.stride[0]), factor=module.stride[0]))
        elif isinstance(module, nn.Conv2d):
            length = (module.kernel_size[0] - 1) * module.dilation[0] + 1
            before = int(module.padding[0])
            after = length - module.stride[0] - before
            resamplings.append(Resampling(reach=max(before, after, 0), stride=module.stride[0]))
        elif isinstance(module, nn.Upsample):
            resamplings.append(Resampling(factor=int(module.scale_factor)))  # pyright: ignore[reportArgumentType]
    return resamplings


class Layer:
    """A layer of a network, with what it does to positions and channels."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.resamplings = resamplings_of(module)
        self.stride = self.factor = 1
        for resampling in self.resamplings:
            self.stride, self.factor = self.stride * resampling.stride, self.factor * resampling.factor
        self.norms = [part for part in module.modules() if isinstance(part, OptVQGroupNorm)]
        convolutions = [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d))]
        self.channels = convolutions[-1].out_channels if convolutions else None  # None keeps those of the input

    def source(self, window: Window, size: tuple[int, int]) -> Window:
        """The part of an input of this size that a part of the output needs, in whole strides."""
        spans = []
        for span, length in zip(window, size):
            for resampling in reversed(self.resamplings):
                span = resampling.source(span)
            first, last = span[0] // self.stride, -(-span[1] // self.stride)
            spans.append((max(0, first * self.stride), min(length, last * self.stride)))
        rows, columns = spans
        return rows, columns

    def target(self, position: int) -> int:
        """The output position that stands at an input position, which the stride divides."""
        return position // self.stride * self.factor


def _scaled(window: Window, scale: Callable[[int], int]) -> Window:
    (top, bottom), (left, right) = window
    return (scale(top), scale(bottom)), (scale(left), scale(right))


def _part(feature_map: torch.Tensor, window: Window, at: Window) -> torch.Tensor:
    """The window of a map (..., H, W) whose own window is `at`."""
    (top, bottom), (left, right) = window
    (row, _), (column, _) = at
    return feature_map[..., top - row : bottom - row, left - column : right - column]


# ---- norms -----------------------------------------------------------------------------------------------------------


class _Reached(Exception):
    """A tile has got as far as the norm whose statistics are gathered."""


class _Statistics:
    """Mean and variance of the groups of a norm, (B, groups) float64, of a map that comes in parts."""

    def __init__(self, norm: OptVQGroupNorm):
        self.norm, self.count = norm, 0
        self.mean: Any = 0.0
        self.deviations: Any = 0.0  # sum of squares

    def add(self, part: torch.Tensor) -> None:
        values = part.to(torch.promote_types(part.dtype, torch.float32))
        values = values.unflatten(1, (self.norm.num_groups, -1)).flatten(2)
        variance, mean = (of_part.double() for of_part in torch.var_mean(values, dim=2, correction=0))
        count, difference = values.shape[2], mean - self.mean
        self.count += count
        self.mean = self.mean + difference * (count / self.count)
        between = difference**2 * (count * (1 - count / self.count))  # Chan, Golub and LeVeque 1979
        self.deviations = self.deviations + variance * count + between

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the norm makes of a part of the map."""
        return self.norm(hidden_states, (self.mean, self.deviations / self.count))


# ---- tiles -----------------------------------------------------------------------------------------------------------


class _Segment:
    """Layers between two maps that are whole in memory. The maps in it are computed tile by tile.

    Args:
        layers: At least one.
        source: (B, C, H, W), the input of the first.
        pixels: Pixels of the picture for each position of the input.
        tile: Side of a tile in pixels, a multiple of those for each position of any map.
        unit: Pixels for each token.
    """

    def __init__(self, layers: Sequence[Layer], source: torch.Tensor, pixels: int, tile: int, unit: int):
        self.layers, self.source, self.tile, self.unit = layers, source, tile, unit
        self.sizes, self.pixels = [(source.shape[2], source.shape[3])], [pixels]
        for layer in layers:
            height, width = self.sizes[-1]
            self.sizes.append((layer.target(height), layer.target(width)))
            self.pixels.append(self.pixels[-1] * layer.stride // layer.factor)
        self.known: dict[nn.Module, _Statistics] = {}

    def run(self) -> torch.Tensor:
        """The output of the last layer, whole."""
        for index, layer in enumerate(self.layers):
            for norm in layer.norms:
                statistics = _Statistics(norm)
                for core in self._cores():
                    with suppress(_Reached):
                        self._run_tile(index + 1, core, statistics)
                self.known[norm] = statistics
        whole: torch.Tensor | None = None
        for core in self._cores():
            window, values = self._run_tile(len(self.layers), core)
            if whole is None:
                whole = values.new_zeros(*values.shape[:2], *self.sizes[-1])
            _part(whole, window, _all_of(self.sizes[-1])).add_(self._weighted(values, core, window))
        assert whole is not None
        return whole

    def _cores(self) -> Iterator[Window]:
        """The tiles in pixels: they cover the picture, do not overlap, and have about the same size."""
        lengths = (length * self.pixels[0] for length in self.sizes[0])
        rows, columns = (_cut(length, self.tile, self.unit) for length in lengths)
        yield from product(rows, columns)

    @property
    def overlap(self) -> int:
        """Pixels by which a tile reaches into its neighbours, where attention makes the two differ."""
        attends = any(isinstance(layer.module, OptVQAttentionBlock) for layer in self.layers)
        return self.tile // self.unit // PARTS_OF_A_BLENDED_TILE * self.unit if attends else 0

    def _run_tile(
        self, num_layers: int, core: Window, gathered: _Statistics | None = None
    ) -> tuple[Window, torch.Tensor]:
        """The output of the first layers around a tile, and where it stands in the whole output.

        Raises:
            _Reached: At the norm that is to be gathered, with its statistics of the tile.
        """
        pixels = self.pixels[num_layers]
        core = _scaled(core, lambda position: position // pixels)
        overlap = self.overlap // pixels
        (top, bottom), (left, right) = core
        height, width = self.sizes[num_layers]
        last = (
            (max(0, top - overlap), min(height, bottom + overlap)),
            (max(0, left - overlap), min(width, right + overlap)),
        )
        windows = [last]  # of the input of every layer, and of the output of the last
        for index in reversed(range(num_layers)):
            windows.insert(0, self.layers[index].source(windows[0], self.sizes[index]))

        hidden_states = _part(self.source, windows[0], _all_of(self.sizes[0])).contiguous()
        for index in range(num_layers):
            layer, window = self.layers[index], windows[index]

            def apply_norm(norm: nn.Module, inside: torch.Tensor, window: Window = window) -> torch.Tensor:
                if norm in self.known:
                    return self.known[norm].normalize(inside)
                assert gathered is not None and norm is gathered.norm
                gathered.add(_part(inside, core, window))
                raise _Reached

            if isinstance(layer.module, OptVQGroupNorm):
                hidden_states = apply_norm(layer.module, hidden_states)
            elif layer.norms:
                hidden_states = layer.module(hidden_states, apply_norm=apply_norm)
            elif isinstance(layer.module, nn.Conv2d):
                height, width = self.sizes[index]
                hidden_states = _convolve(layer.module, hidden_states, height * width)
            else:
                hidden_states = layer.module(hidden_states)
            hidden_states = _part(hidden_states, windows[index + 1], _scaled(window, layer.target)).contiguous()
        return last, hidden_states

    def _weighted(self, values: torch.Tensor, core: Window, window: Window) -> torch.Tensor:
        """The values of a tile with weights that fall linearly into its neighbours; those of all tiles sum to 1."""
        overlap = self.overlap // self.pixels[-1]
        if overlap == 0:
            return values
        core = _scaled(core, lambda position: position // self.pixels[-1])
        for axis, (first, last), (start, stop), length in zip((-2, -1), core, window, self.sizes[-1]):
            positions = torch.arange(start, stop, device=values.device) + 0.5
            rising = (positions - first) / (2 * overlap) + 0.5 if first > 0 else torch.ones_like(positions)
            falling = (last - positions) / (2 * overlap) + 0.5 if last < length else torch.ones_like(positions)
            weights = torch.minimum(rising, falling).clamp(0, 1).to(values.dtype)
            values = values * (weights[:, None] if axis == -2 else weights)
        return values


def _all_of(size: tuple[int, int]) -> Window:
    return (0, size[0]), (0, size[1])


def _cut(length: int, tile: int, unit: int) -> list[Span]:
    """Spans of at most `tile` pixels, and whole units, that make up the length."""
    units = length // unit
    parts = -(-length // tile)
    return list(pairwise(unit * (units * part // parts) for part in range(parts + 1)))


def _convolve(convolution: nn.Conv2d, part: torch.Tensor, whole_size: int) -> torch.Tensor:
    """The convolution of a part of a map, with the kernel that the whole map gets: the two round differently."""
    values = part.numel()
    whole = part.shape[0] * part.shape[1] * whole_size
    if part.device.type != "cpu" or part.shape[0] >= LARGE_BATCH or not 0 < values <= FEW_VALUES < whole:
        return convolution(part)
    copies = min(-(-LARGE_BATCH // part.shape[0]), FEW_VALUES // values + 1)
    return convolution(part.repeat(copies, 1, 1, 1))[: part.shape[0]]


# ---- networks --------------------------------------------------------------------------------------------------------


def check_tile_size(network: Any, channels: int, pixels: int, tile_size: int, unit: int) -> None:
    """Raises ValueError for what is no side of a tile in pixels, or too small for the tiles of a network with attention.

    Args:
        channels: Of the network's input. The other arguments are those of [`run_in_tiles`].
    """
    if not isinstance(tile_size, Integral) or isinstance(tile_size, bool) or tile_size < unit:
        raise ValueError(
            f"tile_size must be an integer number of pixels, at least the downsampling factor {unit}, got {tile_size!r}"
        )
    blended = (layer for segment in _segments(network, channels, pixels) if len(segment) > 1 for layer in segment)
    if tile_size < PARTS_OF_A_BLENDED_TILE * unit and any(
        isinstance(layer.module, OptVQAttentionBlock) for layer in blended
    ):
        raise ValueError(
            f"tiles of a model with attention are blended: tile_size must be at least {PARTS_OF_A_BLENDED_TILE * unit}, "
            f"{PARTS_OF_A_BLENDED_TILE} times the downsampling factor, got {tile_size}"
        )


@torch.no_grad()
def run_in_tiles(network: Any, source: torch.Tensor, pixels: int, tile_size: int, unit: int) -> torch.Tensor:
    """What `network(source)` returns, without maps in memory that are larger than its input and its output.

    Every norm has the statistics of the whole map: the tiles are computed up to it, for every norm anew. So without attention
    the output differs by the rounding of these statistics, and without norms it does not differ. Attention over maps that
    are whole is that of the network; over others, every tile attends to itself, and neighbours are blended.

    Args:
        network: An encoder or a decoder, in evaluation mode.
        source: (B, C, H, W): pixels, or latents.
        pixels: Pixels for each position of the source along an axis.
        tile_size: Side of a tile in pixels, rounded down to whole tokens.
        unit: Pixels for each token along an axis.

    Raises:
        ValueError: If the tiles are too small, with attention also for those that are to be blended.
    """
    check_tile_size(network, source.shape[1], pixels, tile_size, unit)
    tile = int(tile_size) // unit * unit
    if max(source.shape[2:]) * pixels <= tile:
        return network(source)
    for segment in _segments(network, source.shape[1], pixels):
        is_whole = len(segment) == 1
        source = segment[0].module(source) if is_whole else _Segment(segment, source, pixels, tile, unit).run()
        for layer in segment:
            pixels = pixels * layer.stride // layer.factor
    return source


def _segments(network: Any, channels: int, pixels: int) -> Iterator[Sequence[Layer]]:
    """The layers of a network between one whole map and the next."""
    layers = [Layer(module) for module in network.layers() if not isinstance(module, nn.Identity)]
    values = [channels / pixels**2]  # of each map, for every pixel of the picture
    for layer in layers:
        channels, pixels = layer.channels or channels, pixels * layer.stride // layer.factor
        values.append(channels / pixels**2)
    most = max(values[0], values[-1])
    for first, last in pairwise(index for index, number in enumerate(values) if number <= most):
        yield layers[first:last]
