"""The adversarial loss of the VQGAN (Esser et al. 2021, arXiv 2012.09841, section 3.1), which OptVQ trains with on ImageNet."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from ..processes import mean_over_processes


DiscriminatorLoss = Literal["hinge", "vanilla"]
DISCRIMINATOR_LOSSES = get_args(DiscriminatorLoss)
LARGEST_ADAPTIVE_WEIGHT = 1e4


def discriminator_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor, kind: str = "hinge") -> torch.Tensor:
    """The discriminator's loss, 0-dim: small if logits are large for real patches and small for reconstructed ones.

    Args:
        logits_real, logits_fake: Any shape.
        kind: `"hinge"`: (mean relu(1 - real) + mean relu(1 + fake)) / 2; `"vanilla"`: the same with softplus(-real) and
            softplus(fake), the cross-entropy of a classifier.

    Raises:
        ValueError: For an unknown kind.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())
    if kind == "vanilla":
        return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())
    raise ValueError(f"kind must be one of {DISCRIMINATOR_LOSSES}, got {kind!r}")


def generator_loss(logits_fake: torch.Tensor) -> torch.Tensor:
    """The adversarial loss of the autoencoder, 0-dim: -mean(logits)."""
    return -logits_fake.mean()


def adaptive_weight(reconstruction_gradient: torch.Tensor, generator_gradient: torch.Tensor) -> torch.Tensor:
    """The weight that makes the gradient of the generator's loss as large as that of the reconstruction loss; 0-dim.

    |reconstruction gradient| / (|generator gradient| + 1e-4), clamped to [0, 1e4], and 0 where that is not a number.

    Args:
        reconstruction_gradient, generator_gradient: Of the two losses, with respect to the decoder's last layer.
    """
    ratio = reconstruction_gradient.norm() / (generator_gradient.norm() + 1e-4)
    return ratio.clamp(0, LARGEST_ADAPTIVE_WEIGHT).nan_to_num(nan=0.0).detach()


def gradient_penalty(logits_real: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """R1 (Mescheder et al. 2018, arXiv 1801.04406, eq. 9): half the mean squared gradient norm at real images; 0-dim.

    Args:
        logits_real: Of `pixel_values`, (B, C, H, W), which require a gradient.
    """
    gradient = torch.autograd.grad(logits_real.sum(), pixel_values, create_graph=True)[0]
    return 0.5 * gradient.square().flatten(1).sum(dim=1).mean()


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al. 2021, arXiv 2104.03310, eq. 5): penalises logits of real images above the
    running mean of the fake ones, and logits of fake images below the running mean of the real ones.

    Args:
        decay: Of the running means.
    """

    mean_real: torch.Tensor
    mean_fake: torch.Tensor

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean_real", torch.zeros(()))
        self.register_buffer("mean_fake", torch.zeros(()))

    def forward(self, logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
        """The penalty, 0-dim; first updates the running means over all processes."""
        with torch.no_grad():
            for mean, logits in ((self.mean_real, logits_real), (self.mean_fake, logits_fake)):
                mean.lerp_(mean_over_processes(logits.float().mean()), 1 - self.decay)
        above, below = F.relu(logits_real - self.mean_fake), F.relu(self.mean_real - logits_fake)
        return above.square().mean() + below.square().mean()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context manager in which gradients pass through the module but are not added to its parameters."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
