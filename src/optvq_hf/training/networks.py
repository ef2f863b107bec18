"""The networks of a run: autoencoder and discriminator with their optimizers, and the EMA of the weights."""

from typing import cast

import torch
from accelerate import Accelerator
from torch import nn

from ..backbone_optvq import OptVQDecoder
from ..modeling_optvq import OptVQModel
from ..outputs_optvq import OptVQOutput
from .arguments import Recipe, TrainingArguments
from .codebook import encoding
from .latents import QuantizerAlone
from .losses.objective import make_objective
from .optimization import AveragedWeights, Learner, make_optimizer


class Networks:
    """Autoencoder and discriminator, with all that trains them.

    Args:
        model: Trained in place.
        total_steps: Optimizer steps of the run.
        of_latents: Train the quantizer alone, on batches of the encoder's output.

    Attributes:
        trained: The model, or its quantizer alone, as the accelerator wraps it.
        averaged: The EMA of the weights, or None.
        objective: The losses.
        discriminator: None unless there is an adversarial loss.
        learners: Optimizers with their schedules, by name: "autoencoder" and, if there is one, "discriminator".
        keeps_codes: Whether encoder and codebook are frozen: the quantizer's running state must not move then, or a model
            with the "potentials" assignment would get other codes.
        last_layer: Weight of the decoder's last layer, for the adaptive weight.
    """

    def __init__(
        self, model: OptVQModel, recipe: Recipe, total_steps: int, accelerator: Accelerator, of_latents: bool = False
    ):
        training, optimization, objective = recipe.training, recipe.optimization, recipe.objective
        self.model, self.of_latents = model, of_latents
        self.memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
        model.to(accelerator.device, memory_format=self.memory_format).train()
        model.quantizer.solver = training.solver
        freeze(model, training)
        self.keeps_codes = training.freeze_encoder and model.quantizer.freeze_codebook
        if training.gradient_checkpointing:
            model.activation_checkpointing_enable()
        self.averaged = AveragedWeights(model, optimization.ema_decay) if optimization.ema_decay else None
        if training.compile:
            # Not the decoder's last layer: the adaptive weight takes two more gradients with respect to its weight, which
            # torch 2.14 gets wrong if the layer is compiled.
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
        self.recipe = recipe
        lengths, self.rates = self._lengths(total_steps), peak_rates(recipe.as_flags())
        self.learners = {"autoencoder": Learner(optimizer, optimization, lengths["autoencoder"], accelerator.device)}
        if self.discriminator is not None:
            optimizer = make_optimizer(self.discriminator, self.rates["discriminator"], *settings)
            self.learners["discriminator"] = Learner(optimizer, optimization, lengths["discriminator"])

        # DDP wraps only the autoencoder, and refuses one without gradients, whose EMA codebook is all that learns. The
        # discriminator is called three times per step; its gradients are averaged once.
        has_gradients = any(parameter.requires_grad for parameter in model.parameters())
        trained = QuantizerAlone(model) if of_latents else model
        self.trained = accelerator.prepare_model(trained, evaluation_mode=not has_gradients)
        *_, last = (layer for layer in model.decoder.modules() if isinstance(layer, nn.Conv2d))
        self.last_layer = last.weight

    @torch.no_grad()
    def latents_of(self, batch: torch.Tensor) -> torch.Tensor:
        """Latents (B, codebook_dim, H/f, W/f) of a batch as the run reads it."""
        return self.inputs(batch.to(self.model.device)) if self.of_latents else encoding(self.model)(batch)

    @torch.no_grad()
    def inputs(self, batch: torch.Tensor) -> torch.Tensor:
        """What [`trained`] reconstructs of a batch on its device: the images, or latents of the encoder's output."""
        return self.model.latents_of(batch) if self.of_latents else batch

    @torch.no_grad()
    def pictures(self, inputs: torch.Tensor, output: OptVQOutput) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and their reconstructions; of latents, what the decoder makes of them without and with quantization."""
        assert output.reconstruction is not None
        if self.of_latents:
            return self.model._decode(inputs), self.model._decode(output.reconstruction)
        return inputs, output.reconstruction

    def _lengths(self, total_steps: int) -> dict[str, int]:
        """Steps of each learner in a run of `total_steps`."""
        start = self.recipe.objective.discriminator_start
        return {"autoencoder": total_steps, "discriminator": max(total_steps - start, 1)}

    def change_length(self, total_steps: int) -> None:
        """Continues all learning rates as those of a run of this many steps."""
        for name, learner in self.learners.items():
            learner.change_length(self._lengths(total_steps)[name])

    def change_rates(self, before: dict) -> None:
        """Multiplies the rest of the schedules by new / old if the peak learning rates were others.

        Args:
            before: Settings of the run so far.
        """
        for name, learner in self.learners.items():
            old = peak_rates({**self.recipe.as_flags(), **before})[name]
            if old != self.rates[name]:
                learner.scale_rate(self.rates[name] / old)

    def models(self) -> dict[str, OptVQModel]:
        """The models by the folder in which each is saved: "" for the trained one, "ema" for the EMA of its weights."""
        models = {"": self.model}
        if self.averaged is not None:
            models["ema"] = cast(OptVQModel, self.averaged.module)  # torch annotates it as a Module
        return models

    def adversarial_statistics(self, step: int) -> list[torch.Tensor]:
        """Running statistics of batch norms and LeCam that `step` updates: a few vectors."""
        modules = [self.discriminator, self.objective.lecam] if self.objective.is_adversarial(step) else []
        return [tensor for module in modules if module is not None for tensor in module.buffers()]

    @property
    def skipped(self) -> torch.Tensor:
        """0-dim: skipped steps of both networks so far."""
        return torch.stack([learner.skipped for learner in self.learners.values()]).sum()

    @property
    def longest_skip(self) -> torch.Tensor:
        """0-dim: the most steps in a row that were skipped, of either network."""
        return torch.stack([learner.longest_skip for learner in self.learners.values()]).max()


def peak_rates(settings: dict) -> dict[str, float]:
    """Peak learning rate of each learner by the settings of a run."""
    rate = settings["learning_rate"]
    return {"autoencoder": rate, "discriminator": settings["discriminator_learning_rate"] or rate}


def freeze(model: OptVQModel, training: TrainingArguments) -> None:
    """Excludes parts of the model from training, as the flags say.

    An EMA codebook learns without gradients.

    Raises:
        ValueError: If nothing is left to train.
    """
    if training.freeze_encoder:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    if training.freeze_decoder:
        model.decoder.requires_grad_(False)
        model.post_quant_conv.requires_grad_(False)
    learns = [parameter.requires_grad for parameter in model.parameters()]
    learns += [level.learns_by_average for level in model.quantizer.levels]
    if not any(learns):
        raise ValueError("encoder, decoder and codebook are frozen: nothing is left to train")
