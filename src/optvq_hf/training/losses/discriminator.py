"""The patch discriminator of the adversarial loss (PatchGAN; Isola et al. 2017, arXiv 1611.07004), as the VQGAN uses it."""

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from ..processes import mean_over_processes, world_size


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes in training. torch's SyncBatchNorm (2.14) needs a GPU."""

    num_batches_tracked: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    share = 0.1  # weight of a batch in the running statistics: torch's default momentum

    def __init__(self, num_features: int):
        super().__init__(num_features, momentum=self.share)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or world_size() == 1:
            return super().forward(hidden_states)
        hidden_states = hidden_states.float()
        mean = mean_over_processes(hidden_states.mean(dim=(0, 2, 3)))
        centred = hidden_states - mean[:, None, None]
        variance = mean_over_processes(centred.square().mean(dim=(0, 2, 3)))
        count = hidden_states.numel() // self.num_features * world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.share)
            self.running_var.lerp_(variance * count / max(count - 1, 1), self.share)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


class PatchDiscriminator(nn.Module, PyTorchModelHubMixin):
    """Scores patches as real or reconstructed: (B, num_channels, H, W) in [-1, 1] -> logits (B, 1, H', W').

    Every logit sees one patch of the image, of 70 x 70 pixels with 3 layers; larger means real. Saved and loaded with
    `save_pretrained` and `from_pretrained`.

    Args:
        num_channels: Channels of the images.
        base_channels: Channels after the first layer; each of the next doubles them, up to 8 times as many.
        num_layers: Strided layers, each of which halves height and width.

    Raises:
        ValueError: In `forward`, for images of fewer than 3 * 2^num_layers pixels.
    """

    def __init__(self, num_channels: int = 3, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        layers = [nn.Conv2d(num_channels, base_channels, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        channels = base_channels
        for layer in range(1, num_layers + 1):
            out_channels = base_channels * min(2**layer, 8)
            layers += [
                nn.Conv2d(channels, out_channels, 4, stride=2 if layer < num_layers else 1, padding=1, bias=False),
                BatchNorm2d(out_channels),
                nn.LeakyReLU(0.2, True),
            ]
            channels = out_channels
        layers.append(nn.Conv2d(channels, 1, kernel_size=4, stride=1, padding=1))
        self.smallest_side = 3 * 2**num_layers  # pixels; the last two layers take one off each
        self.main = nn.Sequential(*layers)
        self.apply(_start)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if min(pixel_values.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"this discriminator needs images of at least {self.smallest_side} pixels, got "
                f"{' x '.join(map(str, pixel_values.shape[2:]))}: lower --discriminator-layers, or raise --image-size"
            )
        return self.main(pixel_values)

    @classmethod
    def from_weights(cls, weights: dict[str, torch.Tensor]) -> "PatchDiscriminator":
        """A discriminator with these weights; its sizes follow from their shapes.

        Raises:
            ValueError: If it is not the state dict of a patch discriminator.
        """
        convolutions = [tensor for tensor in weights.values() if tensor.ndim == 4]
        if len(convolutions) < 3:
            raise ValueError("the weights are not those of a patch discriminator: too few convolutions")
        base_channels, num_channels = convolutions[0].shape[:2]
        with torch.device("meta"):  # nothing is allocated before the shapes fit
            model = cls(num_channels, base_channels, num_layers=len(convolutions) - 2)
        expected = model.state_dict()
        for name in expected.keys() | weights.keys():
            if name not in weights or name not in expected or weights[name].shape != expected[name].shape:
                raise ValueError(f"the weights are not those of a patch discriminator: {name} does not fit")
            if weights[name].is_floating_point() != expected[name].is_floating_point():
                raise ValueError(f"the weights are not those of a patch discriminator: {name} is {weights[name].dtype}")
        model.load_state_dict({name: tensor.contiguous().clone() for name, tensor in weights.items()}, assign=True)
        return model.requires_grad_()


def _start(module: nn.Module) -> None:
    """Initialises as pix2pix does: weights near 0, scales near 1."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
