"""A model without its frozen encoder and decoder, for training on latents; and latents of even scale."""

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import nn

from ..modeling_optvq import OptVQModel
from ..outputs_optvq import OptVQOutput
from .processes import gather


class QuantizerAlone(nn.Module):
    """What is trained on latents: the quantizer of a model, whose other parts stay as they are.

    Its reconstructions are the quantized latents.
    """

    def __init__(self, model: OptVQModel):
        super().__init__()
        self.model = model

    def forward(self, latents: torch.Tensor) -> OptVQOutput:
        output = self.model.quantizer(latents)
        return OptVQOutput(
            quantized=output.quantized,
            reconstruction=output.quantized,
            codes=output.codes,
            latents=latents,
            perplexity=output.perplexity,
            quantizer_loss=output.loss,
            code_counts=output.diagnostics["code_counts"],
            marginal_error=output.diagnostics.get("marginal_error"),
        )


@torch.no_grad()
def whiten(
    model: OptVQModel,
    batches: Iterable[torch.Tensor],
    num_batches: int,
    latents_of: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Gives every channel of the latents mean 0 and standard deviation 1, by the convolutions around the quantizer.

    What the model reconstructs without quantization does not change.

    Args:
        batches: Of which `num_batches` are taken; all processes take their own.
        latents_of: Makes latents (B, codebook_dim, H/f, W/f) of a batch.

    Raises:
        ValueError: If a channel is the same everywhere.
    """
    latents = torch.cat([gather(latents_of(batch)) for batch in islice(batches, num_batches)])
    deviation, mean = torch.std_mean(latents.double(), dim=(0, 2, 3))
    if not bool((deviation > 0).all()):
        raise ValueError("--whiten-latents: a channel of the latents is the same at every position")
    before, after = model.quant_conv, model.post_quant_conv
    assert isinstance(before, nn.Conv2d) and isinstance(after, nn.Conv2d)  # checked before
    assert before.bias is not None and after.bias is not None
    weight, inverse = before.weight.double(), after.weight.double()
    before.weight.copy_(weight / deviation[:, None, None, None])
    before.bias.copy_((before.bias - mean) / deviation)
    after.bias.copy_(after.bias + inverse[:, :, 0, 0] @ mean)
    after.weight.copy_(inverse * deviation[:, None, None])
