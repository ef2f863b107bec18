"""The two networks that are trained, and one step of both."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from ..modeling_optvq import OptVQModel, OptVQOutput
from .arguments import Recipe
from .objective import make_objective
from .optimization import Learner, average_weights, make_optimizer
from .processes import average_gradients


class StepResult(NamedTuple):
    """What a step tells the record. Tensors stay on the device.

    Attributes:
        output: The model's output for the last batch of the step.
        code_counts: (codebook_size,) int64, how often each code was used in the step, in all batches and processes.
        codebook: The codes that batch was assigned to, (codebook_size, head_dim); None unless the step was to be measured.
        pixel_values: The last batch.
        values: 0-dim tensors by name: the loss, its unweighted parts, gradient norms; of this process.
    """

    output: OptVQOutput
    code_counts: torch.Tensor
    codebook: torch.Tensor | None
    pixel_values: torch.Tensor
    values: dict[str, torch.Tensor]


class Networks:
    """Autoencoder and discriminator with their optimizers, and the moving average of the autoencoder's weights.

    Args:
        model: Trained in place.
        total_steps: Optimizer steps of the run.

    Attributes:
        averaged: The moving average, an `AveragedModel`, or None.
        learners: By name, "autoencoder" and perhaps "discriminator".
    """

    def __init__(self, model: OptVQModel, recipe: Recipe, total_steps: int, accelerator: Accelerator):
        training, optimization, objective = recipe.training, recipe.optimization, recipe.objective
        self.model, self.recipe, self.accelerator = model, recipe, accelerator
        self.memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        model.to(accelerator.device, memory_format=self.memory_format).train()
        if training.gradient_checkpointing:
            model.activation_checkpointing_enable()
        self.averaged = average_weights(model, optimization.ema_decay) if optimization.ema_decay else None
        if training.compile:
            # Not the decoder's last layer: the adaptive weight takes its gradient twice more; compiled, that comes out wrong.
            stages = [model.decoder.mid, *model.decoder.stages] if model.config.backbone == "vqgan" else []
            for module in (model.encoder, *stages):
                module.compile()

        self.objective = make_objective(objective, model.config.num_channels, accelerator.device)
        self.discriminator = self.objective.discriminator
        codebook = list(model.quantizer.parameters())
        settings = (optimization.weight_decay, optimization.adam_beta2)
        optimizer = make_optimizer(
            model, optimization.learning_rate, *settings, codebook, optimization.codebook_learning_rate_multiplier
        )
        self.learners = {"autoencoder": Learner(optimizer, optimization, total_steps)}
        if self.discriminator is not None:
            rate = objective.discriminator_learning_rate or optimization.learning_rate
            optimizer = make_optimizer(self.discriminator, rate, *settings)
            steps = max(total_steps - objective.discriminator_start, 1)
            self.learners["discriminator"] = Learner(optimizer, optimization, steps)

        # Only the autoencoder is wrapped. The discriminator is called three times a step: its gradients are averaged once.
        self.trained = accelerator.prepare_model(model)
        self.last_layer = [layer for layer in model.decoder.modules() if isinstance(layer, nn.Conv2d)][-1].weight
        model.quantizer.defer_updates = True  # the running state moves once per optimizer step, unless that is skipped

    def step(self, batches: Sequence[torch.Tensor], step: int, measured: bool = False) -> StepResult:
        """One optimizer step of the autoencoder, and, once it has started, of the discriminator.

        Each batch is encoded and decoded once, for both. A batch that is not finite makes all gradients of the step NaN, in
        every process; [`Learner.step`] skips the step then, and the running state stays as it was.

        Args:
            batches: Each (B, C, H, W) in [-1, 1]; their gradients are averaged.
            step: From 0.
            measured: Keep the codebook that the last batch met.

        Raises:
            ValueError: If the encoder's output is not finite.
        """
        self.trained.train()
        share, values, code_counts = 1 / len(batches), {}, 0
        codebook = self.model.get_codebook().detach().clone() if measured else None
        statistics = self._adversarial_statistics(step)
        kept = [tensor.clone() for tensor in statistics]
        for number, pixel_values in enumerate(batches):
            pixel_values = pixel_values.to(self.accelerator.device, non_blocking=True, memory_format=self.memory_format)
            finite = pixel_values.isfinite().all()
            pixel_values = torch.where(finite, pixel_values, 0.0)
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.trained):
                output = self.trained(pixel_values)
                code_counts = code_counts + output.code_counts
                with self.accelerator.autocast():
                    loss, parts = self.objective.autoencoder_loss(
                        output.reconstruction, pixel_values, output.quantizer_loss, step, self.last_layer
                    )
                loss = loss * torch.where(finite, share, torch.nan)
                loss.backward()
            with self.accelerator.autocast():
                discriminator_loss, discriminator_parts = self.objective.discriminator_loss(
                    output.reconstruction, pixel_values, step
                )
            if discriminator_loss is not None:
                (discriminator_loss * torch.where(finite, share, torch.nan)).backward()
            for name, part in {"loss": loss.detach() / share, **parts, **discriminator_parts}.items():
                values[name] = values.get(name, 0) + share * part

        values["gradient_norm"] = self.learners["autoencoder"].step()
        if discriminator_loss is not None:
            average_gradients(self.learners["discriminator"].parameters)
            values["discriminator_gradient_norm"] = self.learners["discriminator"].step()
        keep = sum(learner.overflow for learner in self.learners.values()) == 0
        self.model.quantizer.apply_updates(keep)
        for tensor, before in zip(statistics, kept):
            tensor.copy_(torch.where(keep, tensor, before))
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return StepResult(output, code_counts, codebook, pixel_values, values)

    def models(self) -> dict[str, OptVQModel]:
        """By name of the folder in which each is saved: "" is the trained one, "ema" the moving average."""
        averaged = {} if self.averaged is None else {"ema": self.averaged.module}
        return {"": self.model, **averaged}

    @property
    def skipped(self) -> torch.Tensor:
        """0-dim: steps of either network that were left out so far because they were not finite."""
        return sum(learner.skipped for learner in self.learners.values())

    @property
    def longest_skip(self) -> torch.Tensor:
        """0-dim: the most steps of either network that were left out in a row."""
        return torch.stack([learner.longest_skip for learner in self.learners.values()]).max()

    def _adversarial_statistics(self, step: int) -> list[torch.Tensor]:
        """What a step moves in the discriminator and LeCam besides weights: a few vectors as long as a layer has channels."""
        modules = [self.discriminator, self.objective.lecam] if self.objective.is_adversarial(step) else []
        return [tensor for module in modules if module is not None for tensor in module.buffers()]
