"""Codecs: what the evaluator asks of a tokenizer, and adapters for those of this package, of diffusers and of transformers."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..codes_optvq import check_codes
from ..modeling_optvq import OptVQModel


@dataclass(frozen=True)
class Codec:
    """Images to codes and back.

    Attributes:
        encode: Images (B, C, H, W) float in [-1, 1] to integer codes (B, heads, h, w) in [0, codebook_size).
        decode: Such codes to images (B, C, H, W) float, about in [-1, 1].
        codebook_size: Number of codes that each head chooses from.
        num_quantizers: Levels of residual quantization. Codes are level by level; `decode` takes the first levels alone too.
    """

    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    codebook_size: int
    num_quantizers: int = 1

    def codes_of(self, images: torch.Tensor) -> torch.Tensor:
        """The codes of images (B, C, H, W), as int64.

        Raises:
            ValueError: If `encode` gives anything but what is said above.
            IndexError: If it gives codes that are not in [0, codebook_size).
        """
        codes = self.encode(images)
        shape = tuple(codes.shape)
        if len(shape) != 4 or shape[0] != len(images) or 0 in shape[1:] or shape[1] % self.num_quantizers:
            levels = f", equally many of {self.num_quantizers} levels" if self.num_quantizers > 1 else ""
            raise ValueError(f"a codec must encode {len(images)} images to codes (B, heads, h, w){levels}, got {shape}")
        return check_codes(codes, self.codebook_size)

    def first_levels(self, codes: torch.Tensor) -> list[torch.Tensor]:
        """Codes of the first level, of the first two, and so on, without those of all levels."""
        heads = codes.shape[1] // self.num_quantizers
        return [codes[:, : level * heads] for level in range(1, self.num_quantizers)]


def optvq_codec(model: OptVQModel, assignment: str | None = None, tile_size: int | None = None) -> Codec:
    """A model of this package, with an assignment of its codes; by default that of the model at inference.

    With `tile_size`, large images are encoded and decoded in tiles, see [`OptVQModel.encode`].
    """

    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        codes = model.encode(pixel_values, assignment=assignment, return_loss=False, tile_size=tile_size).codes
        assert codes is not None
        return codes

    def decode(codes: torch.Tensor) -> torch.Tensor:
        reconstruction = model.decode(codes=codes, tile_size=tile_size).reconstruction
        assert reconstruction is not None
        return reconstruction.float()

    return Codec(encode, decode, model.config.codebook_size, model.config.num_quantizers)


def diffusers_codec(model: Any) -> Codec:
    """A `VQModel` of diffusers, in evaluation mode."""
    quantize = model.quantize

    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        latents = model.encode(pixel_values.to(model.dtype)).latents
        _, _, (_, _, indices) = quantize(latents)
        return indices.view(len(latents), 1, *latents.shape[2:])

    def decode(codes: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = codes.shape
        shape = (batch, height, width, quantize.vq_embed_dim)
        looks_up = model.config.lookup_from_codebook  # by itself; otherwise it takes what was looked up
        latents = codes.flatten() if looks_up else quantize.get_codebook_entry(codes.flatten(), shape)
        return model.decode(latents, force_not_quantize=True, shape=shape).sample.float()

    return Codec(encode, decode, quantize.n_e)


def transformers_codec(model: Any) -> Codec:
    """The VQ module of a model of transformers, in evaluation mode: `Emu3VQVAE`, `JanusVQVAE`, or one with the same interface.

    Raises:
        ValueError: If it cannot decode: the modules of Chameleon and GLM-Image have no `decode`.
    """
    if not (callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None))):
        raise ValueError(f"{type(model).__name__} cannot be evaluated: it has no encode and decode of images")
    takes_sizes = "image_sizes" in inspect.signature(model.encode).parameters  # Emu3: its codes come and go as maps

    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.to(model.dtype)
        if takes_sizes:
            sizes = torch.tensor([pixel_values.shape[2:]] * len(pixel_values))
            return torch.stack(list(model.encode(pixel_values, image_sizes=sizes).image_tokens))[:, None]
        output = model.encode(pixel_values)
        return output.image_tokens.view(len(pixel_values), 1, *output.last_hidden_state.shape[2:])

    def decode(codes: torch.Tensor) -> torch.Tensor:
        return model.decode(codes[:, 0] if takes_sizes else codes.flatten(1)).float()

    return Codec(encode, decode, model.quantize.embedding.num_embeddings)
