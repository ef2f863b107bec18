"""The perceptual loss LPIPS (Zhang et al. 2018, arXiv 1801.03924): frozen, always in evaluation mode."""

from typing import Literal, get_args

import torch
from torch import nn


Network = Literal["vgg", "alex", "squeeze"]
NETWORKS = get_args(Network)


class PerceptualLoss(nn.Module):
    """Mean LPIPS of reconstructions: (B, 3 or 1, H, W) twice, in [-1, 1] -> 0-dim.

    Args:
        network: `"vgg"` (the paper's), `"alex"` or `"squeeze"`, whose ImageNet weights are downloaded once; or a module
            that returns one distance per image.

    Raises:
        OSError: If the weights cannot be downloaded.
        ValueError: For an unknown name.
    """

    def __init__(self, network: Network | nn.Module = "vgg"):
        super().__init__()
        self.network = network if isinstance(network, nn.Module) else _download(network)
        self.network.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stays in evaluation mode: the dropout of LPIPS would make the loss random."""
        return super().train(False)

    def forward(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.distances(reconstruction, pixel_values).mean()

    def distances(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """LPIPS (B,) of every image, from the same arguments."""
        if pixel_values.shape[1] == 1:
            reconstruction, pixel_values = (images.expand(-1, 3, -1, -1) for images in (reconstruction, pixel_values))
        # Differences of large activations lose digits in bf16.
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.network(reconstruction.float(), pixel_values.float()).flatten()


def _download(network: Network) -> nn.Module:
    if network not in NETWORKS:
        raise ValueError(f"the perceptual network must be one of {NETWORKS} or a module, got {network!r}")
    from torchmetrics.functional.image.lpips import _LPIPS

    try:
        return _LPIPS(net=network)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"cannot download the ImageNet weights of {network!r} for LPIPS: {error}; download them once with a connection, "
            "or do without: set the perceptual weight to 0 in training, and name no LPIPS in --metrics"
        ) from error
