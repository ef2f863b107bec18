"""What the demo computes, without its page: pictures to codes, edits, mixtures, statistics, and codes as coloured maps."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from optvq_hf import OptVQImageProcessor, OptVQModel


Codes = np.ndarray  # int64 (codes_per_token, rows, columns) in [0, codebook_size)

ASSIGNMENTS = ("nearest", "potentials", "sinkhorn")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Tokenizer:
    """A model, its image processor, and the folder or Hub id of both."""

    source: str
    model: OptVQModel
    image_processor: OptVQImageProcessor

    @property
    def channels(self) -> list[str]:
        """Names of the codes of one token, in their order."""
        config = self.model.config
        heads = [f"head {head + 1}" for head in range(config.num_codebook_heads)]
        if config.num_quantizers == 1:
            return heads
        return [f"level {level + 1}, {head}" for level in range(config.num_quantizers) for head in heads]


@dataclass(frozen=True)
class Tokens:
    """A picture as the model sees it, and its codes.

    Attributes:
        pixel_values: float32 (1, num_channels, H, W) in [-1, 1].
        codes: int64 (codes_per_token, H/f, W/f).
        source: What `load` takes for the model, without which the codes mean nothing.
    """

    pixel_values: torch.Tensor
    codes: Codes
    source: str


@lru_cache(maxsize=4)
def load(source: str) -> Tokenizer:
    """The tokenizer in a folder or under a Hub id.

    Raises:
        OSError, ValueError: If there is none.
    """
    return Tokenizer(source, OptVQModel.from_pretrained(source).eval(), OptVQImageProcessor.from_pretrained(source))


@torch.inference_mode()
def tokenize(tokenizer: Tokenizer, picture: Image.Image, assignment: str, side: int) -> Tokens:
    """Codes of the square in the middle of a picture, resized to `side` pixels, a multiple of the downsample factor."""
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    pixel_values = tokenizer.image_processor(picture, return_tensors="pt", **size)["pixel_values"]
    codes = tokenizer.model.encode(pixel_values, assignment=assignment, return_loss=False).codes
    return Tokens(pixel_values, codes[0].numpy(), tokenizer.source)


@torch.inference_mode()
def decode(tokenizer: Tokenizer, codes: Codes) -> Image.Image:
    """The picture that codes stand for."""
    reconstruction = tokenizer.model.decode(codes=torch.from_numpy(codes)[None]).reconstruction
    return tokenizer.image_processor.postprocess(reconstruction)[0]


def input_picture(tokenizer: Tokenizer, tokens: Tokens) -> Image.Image:
    return tokenizer.image_processor.postprocess(tokens.pixel_values)[0]


def psnr(picture: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of one size; infinite if they are equal."""
    error = np.square(np.asarray(picture, np.float64) - np.asarray(other, np.float64)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def write_code(codes: Codes, channel: int, row: int, column: int, code: int, width: int = 1) -> Codes:
    """A copy with one code in a square of `width` x `width` tokens around a position; what lies outside is cut off."""
    edited, reach = codes.copy(), width // 2
    rows, columns = (slice(max(0, middle - reach), max(0, middle - reach + width)) for middle in (row, column))
    edited[channel, rows, columns] = code
    return edited


@torch.inference_mode()
def mix_vectors(tokenizer: Tokenizer, first: Codes, second: Codes, share: float, assignment: str) -> Codes:
    """Codes of the vectors between those of two pictures: (1 - share) * first + share * second, quantized again.

    With several levels, also the vectors of one picture may get other codes than its own: levels choose one after the other.
    """
    quantizer = tokenizer.model.quantizer
    of_first, of_second = (quantizer.lookup(torch.from_numpy(codes)[None]) for codes in (first, second))
    mixed = torch.lerp(of_first, of_second, share)
    return quantizer(mixed, assignment=assignment, return_loss=False).codes[0].numpy()


def mix_positions(first: Codes, second: Codes, share: float) -> Codes:
    """All codes of the second picture at a share of the positions, those of the first elsewhere.

    The order of positions is drawn once, so that a larger share keeps the positions of a smaller one.
    """
    order = np.random.default_rng(0).permutation(first[0].size).reshape(first[0].shape)
    return np.where(order < round(share * first[0].size), second, first)


def statistics(tokenizer: Tokenizer, tokens: Tokens) -> dict[str, str]:
    """Sizes of the codes of one picture, as text by name."""
    config, codes = tokenizer.model.config, tokens.codes
    bits, pixels = codes.size * np.log2(config.codebook_size), tokens.pixel_values[0, 0].numel()
    _, rows, columns = codes.shape
    return {
        "tokens": f"{rows} x {columns}, of {len(codes)} codes in [0, {config.codebook_size:,})",
        "bits": f"{bits:,.0f}: {bits / pixels:.2f} a pixel, {8 * config.num_channels * pixels / bits:.1f} times fewer "
        "than 8-bit pixels have",
    }


def usage(tokenizer: Tokenizer, codes: Codes) -> list[tuple[str, int, float, float]]:
    """Per head (and level): name, different codes, those in percent of the most there can be, and perplexity.

    There can be as many as the codebook has, or as the picture has tokens. Perplexity is the exponential of the entropy of the
    frequencies, in [1, different codes].
    """
    most, rows = min(tokenizer.model.config.codebook_size, codes[0].size), []
    for name, of_channel in zip(tokenizer.channels, codes, strict=True):
        _, counts = np.unique(of_channel, return_counts=True)
        frequencies = counts / counts.sum()
        perplexity = np.exp(-(frequencies * np.log(frequencies)).sum())
        rows.append((name, len(counts), 100 * len(counts) / most, float(perplexity)))
    return rows


@torch.inference_mode()
def code_colors(tokenizer: Tokenizer) -> np.ndarray:
    """uint8 (num_quantizers, codebook_size, 3): similar vectors have similar colours.

    Red, green and blue are the ranks of a code along the three directions in which the vectors of its level differ most.
    """
    model = tokenizer.model
    levels = model.get_codebook().float().unflatten(0, (model.config.num_quantizers, -1))
    centred = levels - levels.mean(dim=1, keepdim=True)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:, :3]
    ranks = (centred @ directions.mT).argsort(dim=1).argsort(dim=1).numpy()
    colors = np.full((*ranks.shape[:2], 3), 128, np.uint8)  # vectors of fewer than three numbers leave grey
    colors[..., : ranks.shape[2]] = 40 + 215 * ranks // max(1, ranks.shape[1] - 1)
    return colors


def code_maps(tokenizer: Tokenizer, codes: Codes) -> list[Image.Image]:
    """A picture for every code of the tokens, with one pixel for each token."""
    colors, heads = code_colors(tokenizer), tokenizer.model.config.num_codebook_heads
    return [Image.fromarray(colors[channel // heads][of_channel]) for channel, of_channel in enumerate(codes)]


def enlarge(picture: Image.Image, side: int) -> Image.Image:
    """RGB, `side` pixels wide and high, each pixel a square: nothing is smoothed."""
    return picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
