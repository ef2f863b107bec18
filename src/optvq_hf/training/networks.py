"""What a run trains: autoencoder and discriminator with their optimizers, and the EMA of the autoencoder's weights."""

from typing import cast

import torch
from accelerate import Accelerator
from torch import nn

from ..backbone_optvq import OptVQDecoder
from ..modeling_optvq import OptVQModel
from .arguments import Recipe
from .losses.objective import make_objective
from .optimization import AveragedWeights, Learner, make_optimizer


class Networks:
    """Autoencoder and discriminator, ready to be trained.

    Args:
        model: Trained in place.
        total_steps: Optimizer steps of the run.

    Attributes:
        trained: The model as the accelerator wraps it.
        averaged: The EMA of the weights, or None.
        objective: The losses.
        discriminator: None unless there is an adversarial loss.
        learners: Optimizers with their schedules by name, "autoencoder" and perhaps "discriminator".
        last_layer: Weight of the decoder's last layer, for the adaptive weight.
    """

    def __init__(self, model: OptVQModel, recipe: Recipe, total_steps: int, accelerator: Accelerator):
        training, optimization, objective = recipe.training, recipe.optimization, recipe.objective
        self.model = model
        self.memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        model.to(accelerator.device, memory_format=self.memory_format).train()
        model.quantizer.defer_updates = True  # its running state moves once per step, unless the step is skipped
        if training.gradient_checkpointing:
            model.activation_checkpointing_enable()
        self.averaged = AveragedWeights(model, optimization.ema_decay) if optimization.ema_decay else None
        if training.compile:
            # Not the decoder's last layer: the adaptive weight takes its gradient twice more; compiled, that comes out wrong.
            decoder = model.decoder
            stages = [decoder.mid, *decoder.stages] if isinstance(decoder, OptVQDecoder) else []
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
        *_, last = (layer for layer in model.decoder.modules() if isinstance(layer, nn.Conv2d))
        self.last_layer = last.weight

    def models(self) -> dict[str, OptVQModel]:
        """The models by name of the folder in which each is saved: "" is the trained one, "ema" the EMA of its weights."""
        models = {"": self.model}
        if self.averaged is not None:
            models["ema"] = cast(OptVQModel, self.averaged.module)  # torch knows it as any module
        return models

    def adversarial_statistics(self, step: int) -> list[torch.Tensor]:
        """Running means of the discriminator and of LeCam that `step` moves: a few vectors, as long as a layer has channels."""
        modules = [self.discriminator, self.objective.lecam] if self.objective.is_adversarial(step) else []
        return [tensor for module in modules if module is not None for tensor in module.buffers()]

    @property
    def skipped(self) -> torch.Tensor:
        """0-dim: steps of either network that were skipped so far because they were not finite."""
        return torch.stack([learner.skipped for learner in self.learners.values()]).sum()

    @property
    def longest_skip(self) -> torch.Tensor:
        """0-dim: the most steps of either network that were skipped in a row."""
        return torch.stack([learner.longest_skip for learner in self.learners.values()]).max()
