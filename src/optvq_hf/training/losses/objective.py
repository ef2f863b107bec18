"""The training objective: pixel, perceptual, quantizer and adversarial losses (OptVQ, arXiv 2412.15195)."""

from dataclasses import dataclass

import torch
from safetensors import SafetensorError

from ...data.fetching import find_folder
from ..arguments import ObjectiveArguments
from ..processes import mean_over_processes
from .adversarial import LeCam, adaptive_weight, discriminator_loss, frozen, generator_loss, gradient_penalty
from .discriminator import PatchDiscriminator
from .perceptual import PerceptualLoss


@dataclass
class Objective:
    """The losses of the autoencoder and of its discriminator, each with its weight.

    Losses are over this process's images; statistics (batch norms, LeCam, the adaptive weight) are over all processes.

    Args:
        arguments: Weights, start and ramp.
        perceptual: The perceptual loss; None ignores its weight.
        discriminator: The discriminator; None means no adversarial loss. The weight of that loss is
            `arguments.adversarial_weight` times [`~adversarial.adaptive_weight`].
        lecam: The LeCam regularisation; None ignores its weight.
    """

    arguments: ObjectiveArguments
    perceptual: PerceptualLoss | None = None
    discriminator: PatchDiscriminator | None = None
    lecam: LeCam | None = None

    def autoencoder_loss(
        self,
        reconstruction: torch.Tensor,
        pixel_values: torch.Tensor,
        quantizer_loss: torch.Tensor,
        step: int = 0,
        last_layer: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of encoder, quantizer and decoder. Its gradient is not added to the discriminator's parameters.

        Args:
            reconstruction, pixel_values: (B, C, H, W) in [-1, 1].
            quantizer_loss: 0-dim.
            step: Step of the run, from 0.
            last_layer: Weight of the decoder's last layer, for the adaptive weight; needed with a discriminator.

        Returns:
            The 0-dim loss, and its parts, unweighted and detached: "l1", "l2", "quantizer", and where they apply
            "perceptual", "generator" and "adaptive_weight". "quantizer_share" is the quantizer's share of the loss without
            the adversarial part, in per cent.
        """
        reconstruction = reconstruction.float()
        difference = reconstruction - pixel_values
        parts = {"l1": difference.abs().mean(), "l2": difference.square().mean(), "quantizer": quantizer_loss}
        of_images = self.arguments.l1_weight * parts["l1"] + self.arguments.l2_weight * parts["l2"]
        if self.perceptual is not None and self.arguments.perceptual_weight > 0:
            parts["perceptual"] = self.perceptual(reconstruction, pixel_values)
            of_images = of_images + self.arguments.perceptual_weight * parts["perceptual"]
        of_quantizer = self.arguments.quantizer_weight * quantizer_loss
        loss = of_images + of_quantizer
        parts["quantizer_share"] = 100 * of_quantizer / (of_images + of_quantizer).clamp_min(1e-12)
        discriminator = self.discriminator if self.is_adversarial(step) else None
        if discriminator is not None:
            assert last_layer is not None, "the adaptive weight needs last_layer"
            with frozen(discriminator):
                parts["generator"] = generator_loss(discriminator(reconstruction).float())
                gradients = (
                    mean_over_processes(torch.autograd.grad(part, last_layer, retain_graph=True)[0])
                    for part in (of_images, parts["generator"])
                )
                parts["adaptive_weight"] = adaptive_weight(*gradients)
            weight = self.arguments.adversarial_weight * self.ramp(step) * parts["adaptive_weight"]
            loss = loss + weight * parts["generator"]
        return loss, {name: part.detach() for name, part in parts.items()}

    def discriminator_loss(
        self, reconstruction: torch.Tensor, pixel_values: torch.Tensor, step: int = 0
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """The loss of the discriminator alone; None before its start.

        Returns:
            The 0-dim loss, and "discriminator" (unweighted), the mean logits "logits_real" and "logits_fake", and where they
            apply "lecam" and "r1", detached.
        """
        discriminator = self.discriminator if self.is_adversarial(step) else None
        if discriminator is None:
            return None, {}
        penalized = (
            self.arguments.r1_weight > 0 and (step - self.arguments.discriminator_start) % self.arguments.r1_every == 0
        )
        real = pixel_values.detach().requires_grad_() if penalized else pixel_values
        logits_real = discriminator(real).float()
        logits_fake = discriminator(reconstruction.detach().float()).float()
        loss = discriminator_loss(logits_real, logits_fake, self.arguments.discriminator_loss)
        parts = {"discriminator": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
        loss = self.arguments.discriminator_weight * loss
        if self.lecam is not None and self.arguments.lecam_weight > 0:
            parts["lecam"] = self.lecam(logits_real, logits_fake)
            loss = loss + self.arguments.lecam_weight * parts["lecam"]
        if penalized:
            parts["r1"] = gradient_penalty(logits_real, real)
            loss = loss + self.arguments.r1_weight * self.arguments.r1_every * parts["r1"]
        return loss, {name: part.detach() for name, part in parts.items()}

    def is_adversarial(self, step: int) -> bool:
        """Whether there is an adversarial loss at this step, from 0."""
        return self.discriminator is not None and step >= self.arguments.discriminator_start

    def ramp(self, step: int) -> float:
        """Factor of the adversarial weight at a step: rises to 1 over the ramp. The discriminator's own loss has no ramp."""
        return min(1.0, (step - self.arguments.discriminator_start + 1) / max(self.arguments.discriminator_ramp, 1))


def make_objective(arguments: ObjectiveArguments, num_channels: int, device: torch.device) -> Objective:
    """Makes the losses that the arguments ask for. The perceptual network is downloaded only if it is used.

    Raises:
        OSError: If weights cannot be downloaded or read.
        ValueError: If a given discriminator does not fit the images.
    """
    perceptual = discriminator = lecam = None
    if arguments.perceptual_weight > 0:
        perceptual = PerceptualLoss(arguments.perceptual_network).to(device)
    if arguments.adversarial_weight > 0:
        discriminator = make_discriminator(arguments, num_channels).to(device)
    if arguments.lecam_weight > 0:
        lecam = LeCam().to(device)
    return Objective(arguments, perceptual, discriminator, lecam)


def make_discriminator(arguments: ObjectiveArguments, num_channels: int) -> PatchDiscriminator:
    """The discriminator that the arguments ask for, or that lies where they say. Errors as of [`make_objective`]."""
    if arguments.discriminator_weights is None:
        return PatchDiscriminator(num_channels, arguments.discriminator_channels, arguments.discriminator_layers)
    try:
        folder = find_folder(arguments.discriminator_weights, allow_patterns=["discriminator/*"])
        if (folder / "discriminator").is_dir():  # beside a model
            folder = folder / "discriminator"
        discriminator = PatchDiscriminator.from_pretrained(folder, strict=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the discriminator of {arguments.discriminator_weights!r}: {error}") from error
    if discriminator.main[0].in_channels != num_channels:
        raise ValueError(
            f"the discriminator in {arguments.discriminator_weights!r} takes images of {discriminator.main[0].in_channels} "
            f"channels, but the model has num_channels={num_channels}"
        )
    return discriminator.train()
