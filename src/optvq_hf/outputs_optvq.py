"""What the model and the quantizer return."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput


@dataclass
class OptVQEncoderOutput(ModelOutput):
    """Output of [`OptVQModel.encode`].

    Args:
        quantized: (B, codebook_dim, H/f, W/f), the code vectors.
        codes: int64 in [0, codebook_size), (B, codes_per_token, H/f, W/f), level by level, head by head.
        latents: (B, codebook_dim, H/f, W/f), the features before quantization.
        quantizer_loss: 0-dim, see [`~quantizer_optvq.OptVQQuantizer`].
        perplexity: 0-dim in [1, codebook_size], exponential of the entropy of the code frequencies in the batch, and the mean
            of that over levels.
        hidden_states: With `output_hidden_states=True`, the encoder's feature maps (B, channels, height, width), from full
            resolution to that of the tokens: the input of the first stage and the output of every stage of the VQGAN, or the
            maps at each resolution of the plain CNN.
        code_counts: (num_quantizers * codebook_size,) int64, how often each code was used in the batch, level by level (in
            training, that of all processes).
        marginal_error: 0-dim in [0, 2], sum over codes of |mass - 1 / codebook_size|; None for assignments without transport.

    `quantizer_loss`, `perplexity`, `code_counts` and `marginal_error` are None with `return_loss=False`.
    """

    quantized: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    quantizer_loss: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    code_counts: torch.Tensor | None = None
    marginal_error: torch.Tensor | None = None


@dataclass
class OptVQDecoderOutput(ModelOutput):
    """Output of [`OptVQModel.decode`].

    Args:
        reconstruction: (B, num_channels, H, W), in [-1, 1] up to the decoder's error: it is not clamped.
    """

    reconstruction: torch.Tensor | None = None


@dataclass
class OptVQOutput(ModelOutput):
    """Output of [`OptVQModel`].

    Args:
        loss: 0-dim, what a plain training minimises: mean |x' - x| + mean (x' - x)^2 + quantizer_loss, for images x and their
            reconstructions x'; present only in training mode or with `return_loss=True`.
        quantized: (B, codebook_dim, H/f, W/f), the code vectors; their gradient passes to the latents, unchanged or rotated as
            `config.gradient_estimator` says.
        reconstruction: (B, num_channels, H, W), in [-1, 1] up to the decoder's error: it is not clamped.
        codes: int64 in [0, codebook_size), (B, codes_per_token, H/f, W/f), level by level, head by head.
        latents: (B, codebook_dim, H/f, W/f), the features before quantization.
        perplexity, hidden_states, quantizer_loss, code_counts, marginal_error: As in [`OptVQEncoderOutput`]; all but the
            hidden states are present with the loss.
    """

    loss: torch.Tensor | None = None
    quantized: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    quantizer_loss: torch.Tensor | None = None
    code_counts: torch.Tensor | None = None
    marginal_error: torch.Tensor | None = None


class QuantizerOutput(NamedTuple):
    """What [`~quantizer_optvq.OptVQQuantizer`] returns.

    Attributes:
        quantized: Shape and dtype of the input; every head's feature replaced by its code vector. The gradient with
            respect to it reaches the input, unchanged or rotated, as the quantizer's `gradient_estimator` says.
        codes: int64 in [0, codebook_size), laid out as the input with `num_heads` entries where that has `dim`: (N, num_heads),
            (B, T, num_heads), (B, num_heads, H, W) or (B, num_heads, T, H, W). -1 at masked positions, where `quantized` is 0.
            Of a residual quantizer with num_quantizers * num_heads entries, level by level; -1 of levels that were dropped.
        loss: 0-dim, the codebook loss; None if it was not asked for.
        perplexity: 0-dim in [1, codebook_size], exponential of the entropy of the code frequencies in the batch (in training
            the batch of all processes), of a residual quantizer the mean over the levels that were used; None if the loss was
            not asked for.
        diagnostics: Tensors that describe the assignment: after transport `marginal_error` (0-dim), `potentials`
            (codebook_size,) and `scale` (0-dim), see [`~sinkhorn.Assignment`]; with the perplexity `code_counts`,
            (codebook_size,) int64, how often each code was used. Of a residual quantizer potentials and code counts of
            all levels joined, scales (num_quantizers,), and the mean of marginal errors over the levels that have one; all are
            0 of levels that were dropped, and potentials and scales of those without transport.
    """

    quantized: torch.Tensor
    codes: torch.Tensor
    loss: torch.Tensor | None
    perplexity: torch.Tensor | None
    diagnostics: dict[str, torch.Tensor]
