"""The adversarial loss of the VQGAN (Esser et al. 2021, arXiv 2012.09841, section 3.1), which OptVQ trains with on ImageNet."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F


DISCRIMINATOR_LOSSES = ("hinge", "vanilla")
LARGEST_ADAPTIVE_WEIGHT = 1e4


def discriminator_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor, kind: str = "hinge") -> torch.Tensor:
    """0-dim: how badly the discriminator tells real patches (large logits) from reconstructed ones (small).

    Args:
        logits_real, logits_fake: Any shape.
        kind: `"hinge"`: (mean relu(1 - real) + mean relu(1 + fake)) / 2; `"vanilla"`: the same with softplus(-real) and
            softplus(fake), the cross-entropy of a classifier.

    Raises:
        ValueError: For another kind.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())
    if kind == "vanilla":
        return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())
    raise ValueError(f"kind must be one of {DISCRIMINATOR_LOSSES}, got {kind!r}")


def generator_loss(logits_fake: torch.Tensor) -> torch.Tensor:
    """0-dim: how little the discriminator takes reconstructions for real, -mean(logits)."""
    return -logits_fake.mean()


def adaptive_weight(reconstruction_gradient: torch.Tensor, generator_gradient: torch.Tensor) -> torch.Tensor:
    """The weight of the generator's loss that gives it as large a gradient as the reconstruction loss has; 0-dim.

    |reconstruction gradient| / (|generator gradient| + 1e-4), clamped to [0, 1e4], and 0 where that is not a number.

    Args:
        reconstruction_gradient, generator_gradient: Of the two losses, with respect to the decoder's last layer.
    """
    ratio = reconstruction_gradient.norm() / (generator_gradient.norm() + 1e-4)
    return ratio.clamp(0, LARGEST_ADAPTIVE_WEIGHT).nan_to_num(nan=0.0).detach()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through the module but are not left in its parameters."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
