"""What a tokenizer is trained to minimise."""

import torch

from ..modeling_optvq import OptVQOutput
from .arguments import TrainingArguments


def autoencoder_loss(
    output: OptVQOutput, pixel_values: torch.Tensor, arguments: TrainingArguments
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L1 + L2 pixel error (means over all values, in [-1, 1]) + the quantizer's loss, each with its weight.

    Returns:
        The 0-dim loss, and its parts "l1", "l2" and "quantizer", unweighted and detached.
    """
    difference = output.reconstruction.float() - pixel_values
    l1, l2 = difference.abs().mean(), difference.square().mean()
    loss = arguments.l1_weight * l1 + arguments.l2_weight * l2 + arguments.quantizer_weight * output.loss
    return loss, {"l1": l1.detach(), "l2": l2.detach(), "quantizer": output.loss.detach()}
