"""What a tokenizer is trained to minimise: pixel, perceptual, quantizer and adversarial losses (OptVQ, arXiv 2412.15195)."""

from dataclasses import dataclass

import torch
from torch import nn

from .adversarial import adaptive_weight, discriminator_loss, frozen, generator_loss
from .discriminator import PatchDiscriminator
from .perceptual import PerceptualLoss


@dataclass
class Objective:
    """The losses of the autoencoder and of its discriminator, each with its weight.

    Args:
        l1_weight, l2_weight: Of the mean absolute and squared pixel errors, on the scale [-1, 1].
        quantizer_weight: Of the quantizer's loss.
        perceptual: The perceptual loss; its weight is `perceptual_weight`.
        discriminator: The discriminator. The adversarial loss has the weight `generator_weight` times
            [`~adversarial.adaptive_weight`]; the discriminator's own loss has `discriminator_weight`.
        discriminator_kind: `"hinge"` or `"vanilla"`.
        discriminator_start: First step (counted from 0) of both. Before it, neither the autoencoder nor the discriminator
            learns from it.
    """

    l1_weight: float = 1.0
    l2_weight: float = 1.0
    quantizer_weight: float = 1.0
    perceptual: PerceptualLoss | None = None
    perceptual_weight: float = 0.0
    discriminator: PatchDiscriminator | None = None
    generator_weight: float = 1.0
    discriminator_weight: float = 1.0
    discriminator_kind: str = "hinge"
    discriminator_start: int = 0

    def autoencoder_loss(
        self,
        reconstruction: torch.Tensor,
        pixel_values: torch.Tensor,
        quantizer_loss: torch.Tensor,
        step: int = 0,
        last_layer: nn.Parameter | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of encoder, quantizer and decoder. It leaves no gradient in the discriminator.

        Args:
            reconstruction, pixel_values: (B, C, H, W) in [-1, 1].
            quantizer_loss: 0-dim.
            step: Step of the run, from 0.
            last_layer: Weight of the decoder's last layer, for the adaptive weight; needed with a discriminator.

        Returns:
            The 0-dim loss, and its parts, unweighted and detached: "l1", "l2", "quantizer", and where they apply
            "perceptual", "generator" and "adaptive_weight".
        """
        reconstruction = reconstruction.float()
        difference = reconstruction - pixel_values
        parts = {"l1": difference.abs().mean(), "l2": difference.square().mean(), "quantizer": quantizer_loss}
        of_images = self.l1_weight * parts["l1"] + self.l2_weight * parts["l2"]
        if self.perceptual is not None and self.perceptual_weight > 0:
            parts["perceptual"] = self.perceptual(reconstruction, pixel_values)
            of_images = of_images + self.perceptual_weight * parts["perceptual"]
        loss = of_images + self.quantizer_weight * quantizer_loss
        if self.is_adversarial(step):
            with frozen(self.discriminator):
                parts["generator"] = generator_loss(self.discriminator(reconstruction))
                gradients = (
                    torch.autograd.grad(part, last_layer, retain_graph=True)[0]
                    for part in (of_images, parts["generator"])
                )
                parts["adaptive_weight"] = adaptive_weight(*gradients)
            loss = loss + self.generator_weight * parts["adaptive_weight"] * parts["generator"]
        return loss, {name: part.detach() for name, part in parts.items()}

    def discriminator_loss(
        self, reconstruction: torch.Tensor, pixel_values: torch.Tensor, step: int = 0
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """The loss of the discriminator alone; None before its start.

        Returns:
            The 0-dim loss, and "discriminator" (unweighted) and the mean logits "logits_real" and "logits_fake", detached.
        """
        if not self.is_adversarial(step):
            return None, {}
        logits_real = self.discriminator(pixel_values)
        logits_fake = self.discriminator(reconstruction.detach().float())
        loss = discriminator_loss(logits_real, logits_fake, self.discriminator_kind)
        parts = {"discriminator": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
        return self.discriminator_weight * loss, {name: part.detach() for name, part in parts.items()}

    def is_adversarial(self, step: int) -> bool:
        return self.discriminator is not None and step >= self.discriminator_start
