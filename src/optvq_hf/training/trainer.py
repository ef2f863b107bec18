"""Training, from top to bottom: the loop, one step of it, what follows a step, and checkpoints."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from ..data.batches import Resumable
from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel, OptVQOutput
from .arguments import Recipe
from .checkpoints import (
    RunState,
    begin_after,
    is_inside,
    keep_newest_and_best,
    load_averaged,
    load_checkpoint,
    log_folder,
    note_score,
    save_checkpoint,
)
from .codebook import follow_schedule, note_schedules, reseed, start_codebook
from .digests import DIGEST, EMA_OF, recipe_of, weights_digest
from .latents import whiten
from .networks import Networks
from .processes import average_gradients
from .results import save_result
from .signals import StopRequest
from .watching.alarms import LONGEST_LOOK, remedy, ringing
from .watching.log import RECIPE_FILE, SUMMARY_FILE, TrainingLog, summarize
from .watching.recorder import Recorder
from .watching.stopwatch import Stopwatch
from .watching.trackers import log_images, start_tracker


class StepResult(NamedTuple):
    """What a step reports to the log. Tensors stay on the device.

    Attributes:
        output: The model's output for the last batch of the step.
        code_counts: (num_quantizers * codebook_size,) int64, uses of each code in the step, in all batches and processes.
        codebook: (num_quantizers * codebook_size, head_dim), the codes before the step; None unless the step is logged.
        pixel_values: The last batch, or its latents.
        values: 0-dim tensors by name: the loss, its unweighted parts, gradient norms; of this process.
    """

    output: OptVQOutput
    code_counts: torch.Tensor
    codebook: torch.Tensor | None
    pixel_values: torch.Tensor
    values: dict[str, torch.Tensor]


class TrainingRun:
    """One training run: the networks, the data, the log, and the current step.

    Every step seeds all random generators with the run's seed, the number of the step and the rank. So their state need not be
    saved, and a resumed run computes the same as an uninterrupted one.

    Args:
        model: Trained in place; in evaluation mode afterwards.
        image_processor: Saved beside the model.
        batches: (B, num_channels, H, W) float in [-1, 1], this process's share, as many as the run needs. If they are
            [`Resumable`], as [`~data.batches.TrainingBatches`] are, a resumed run reads the very next batch.
        total_steps: Optimizer steps of the whole run.
        score: Mean squared error of a model on unseen images, which decides the best checkpoint.
        settings: JSON, saved in checkpoints; by default the recipe's flags.
        on_checkpoint: Called on rank 0 with the folder of every checkpoint.
        dataset: Entries of the summary that name the dataset.
        of_latents: The batches are (B, encoder_channels, H/f, W/f), what the encoder gives; the quantizer is trained alone.

    Attributes:
        step: Steps done.
        interrupted: Whether the run was asked to stop, be it after the last step.
        log: The training log; [`train`] makes it.
        checkpoint: The newest checkpoint, or None.
        resumed_from: The checkpoint that the run started from, or None.
        stopwatch: Seconds spent on logging and on waiting for data.
    """

    log: TrainingLog

    def __init__(
        self,
        model: OptVQModel,
        image_processor: OptVQImageProcessor,
        batches: Iterable[torch.Tensor],
        total_steps: int,
        recipe: Recipe,
        accelerator: Accelerator,
        score: Callable[[OptVQModel], float] | None = None,
        settings: dict | None = None,
        on_checkpoint: Callable[[Path], None] | None = None,
        dataset: dict | None = None,
        of_latents: bool = False,
    ):
        self.model, self.image_processor, self.batches = model, image_processor, batches
        self.total_steps, self.recipe, self.accelerator = total_steps, recipe, accelerator
        self.score, self.on_checkpoint, self.dataset = score, on_checkpoint, dataset or {}
        self.settings = recipe.as_flags() if settings is None else settings
        self.output_dir = Path(recipe.training.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        note_schedules(model.config, recipe.codebook)
        self.networks = Networks(model, recipe, total_steps, accelerator, of_latents)
        self.recorder = Recorder(model.config, accelerator.device, of_latents)
        self.stopwatch = Stopwatch()
        self.step = 0
        self.checkpoint: Path | None = None
        self.resumed_from: Path | None = None
        self.interrupted = False
        self.alarms: list[str] = []

    @property
    def completed(self) -> bool:
        """Whether all steps are done; False if the run was asked to stop early."""
        return self.step >= self.total_steps

    @property
    def continues(self) -> bool:
        """Whether the run continues one of its output folder; otherwise it is the first there."""
        return self.completed or (self.resumed_from is not None and is_inside(self.resumed_from, self.output_dir))

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains from the current step to the last, and saves the result; nothing if all steps are done.

        Raises:
            ValueError: If training cannot continue; the message says at which step and what may help.
            OSError: If the disk is full or cannot be written to.
        """
        if not self.completed:
            self._take_steps()
        self.accelerator.wait_for_everyone()
        self.networks.trained = self.model  # DDP must not hold the process group when that is destroyed
        self.accelerator.end_training()

    def _take_steps(self) -> None:
        accelerator, record = self.accelerator, self.recipe.record
        earlier = None if self.resumed_from is None else log_folder(self.resumed_from)
        self.log = TrainingLog(self.output_dir, self.step, accelerator.is_main_process, earlier)
        if accelerator.is_main_process:
            begin_after(self.output_dir, self.step)
        start_tracker(accelerator, self.recipe, self.step)
        progress = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; few lines in a log file
        )
        source = iter(self.batches)
        with StopRequest(accelerator.device) as stop:
            while not self.completed:
                self._seed()
                self._prepare_codebook(source)
                batches = self._next_batches(source)
                is_logged = (self.step + 1) % record.log_every == 0 or self.step + 1 == self.total_steps
                try:
                    result = self.take_step(batches, self.step, measured=is_logged)
                except ValueError as error:
                    advice = "; a lower learning rate may help" if self.step else ""
                    raise ValueError(f"training stopped at step {self.step + 1}: {error}{advice}") from error
                with self.stopwatch("recorder"):
                    self.recorder.count(result, sum(map(len, batches)) * accelerator.num_processes)
                self.step += 1
                progress.update()
                if is_logged:
                    self.write_log(result, progress)
                if record.images_every and (self.step % record.images_every == 0 or self.completed):
                    pictures = self.networks.pictures(result.pixel_values, result.output)
                    log_images(accelerator, self.output_dir, self.step, *pictures)
                stopping = stop.agreed()
                save_every = self.recipe.training.save_every
                if (save_every and self.step % save_every == 0 and not self.completed) or stopping:
                    self.save(scored=not stopping)
                if stopping:
                    break
            progress.close()
            accelerator.unwrap_model(self.networks.trained, keep_fp32_wrapper=False).eval()
            if self.completed and accelerator.is_main_process:
                self.finish()
            self.interrupted = stop.noted

    def _seed(self) -> None:
        numbers = (self.recipe.training.seed, self.step, self.accelerator.process_index)
        set_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

    def _prepare_codebook(self, source: Iterator[torch.Tensor]) -> None:
        codebook = self.recipe.codebook
        for model in self.networks.models().values():
            follow_schedule(model, codebook, self.step, self.total_steps)
        if codebook.whiten_latents and self.step == 0:
            whiten(self.model, source, codebook.codebook_start_batches, self.networks.latents_of)
        if codebook.codebook_start != "normal" and self.step == codebook.quantization_start:
            start_codebook(self.model, source, codebook, self.recipe.training.seed, self.networks.latents_of)

    def _next_batches(self, source: Iterator[torch.Tensor]) -> list[torch.Tensor]:
        number = self.recipe.training.gradient_accumulation_steps
        with self.stopwatch("waiting for data"):
            batches = list(islice(source, number))
        if len(batches) < number:
            raise ValueError(f"the batches ended after step {self.step} of {self.total_steps}")
        return batches

    # ---- one step ----------------------------------------------------------------------------------------------------

    def take_step(self, batches: Sequence[torch.Tensor], step: int, measured: bool = False) -> StepResult:
        """One optimizer step of the autoencoder and, after its start, of the discriminator.

        Each batch is encoded and decoded once, for both. A batch that is not finite makes all gradients of the step NaN, in
        every process; [`Learner.step`] then skips the step, and the running state does not change.

        Args:
            batches: Each (B, C, H, W) in [-1, 1]; their gradients are averaged.
            step: From 0.
            measured: Also return the codebook before the step, for the log.

        Raises:
            ValueError: If the encoder's output is not finite.
        """
        with self.model.quantizer.deferring():  # its running state is updated once, unless the step is skipped
            networks, objective = self.networks, self.networks.objective
            networks.trained.train()
            codebook = self.model.get_codebook().detach().clone() if measured else None
            statistics = networks.adversarial_statistics(step)
            statistics_before = [tensor.clone() for tensor in statistics]
            share, values, code_counts = 1 / len(batches), {}, torch.zeros_like(self.recorder.counts)
            for number, pixel_values in enumerate(batches):
                pixel_values = pixel_values.to(
                    self.accelerator.device, non_blocking=True, memory_format=networks.memory_format
                )
                finite = pixel_values.isfinite().all()
                pixel_values = networks.inputs(torch.where(finite, pixel_values, 0.0))
                is_last = number == len(batches) - 1
                with nullcontext() if is_last else self.accelerator.no_sync(networks.trained):
                    output = networks.trained(pixel_values)
                    code_counts = code_counts + output.code_counts
                    with self.accelerator.autocast():
                        loss, parts = objective.autoencoder_loss(
                            output.reconstruction, pixel_values, output.quantizer_loss, step, networks.last_layer
                        )
                    loss = loss * torch.where(finite, share, torch.nan)
                    if loss.requires_grad:  # an EMA codebook may be all that learns
                        loss.backward()
                with self.accelerator.autocast():
                    discriminator_loss, discriminator_parts = objective.discriminator_loss(
                        output.reconstruction, pixel_values, step
                    )
                if discriminator_loss is not None:
                    (discriminator_loss * torch.where(finite, share, torch.nan)).backward()
                for name, part in {"loss": loss.detach() / share, **parts, **discriminator_parts}.items():
                    values[name] = values.get(name, 0) + share * part

            values["gradient_norm"] = networks.learners["autoencoder"].step(values["loss"].isfinite())
            if discriminator_loss is not None:
                average_gradients(networks.learners["discriminator"].parameters)
                values["discriminator_gradient_norm"] = networks.learners["discriminator"].step()
            keep = torch.stack([learner.overflow for learner in networks.learners.values()]).sum() == 0
            if not networks.keeps_codes:
                self.model.quantizer.apply_updates(keep)
            for tensor, before in zip(statistics, statistics_before):
                tensor.copy_(torch.where(keep, tensor, before))
            if networks.averaged is not None:
                with self.stopwatch("EMA of the weights"):
                    networks.averaged.update(self.model, keep)
            return StepResult(output, code_counts, codebook, pixel_values, values)

    # ---- what follows a step -----------------------------------------------------------------------------------------

    def write_log(self, result: StepResult, progress: tqdm) -> None:
        """Writes the figures since the last entry to log, tracker and progress bar, and reacts to alarms."""
        num_images = max(getattr(self.batches, "num_images", 0), 1)
        unreadable = 100 * getattr(self.batches, "num_unreadable", 0) / num_images
        with self.stopwatch("recorder"):
            waited = self.stopwatch.seconds["waiting for data"]
            values = self.recorder.entry(result, self.networks.skipped, unreadable, waited)
        for name, learner in self.networks.learners.items():
            values["learning_rate" if name == "autoencoder" else f"{name}_learning_rate"] = learner.last_rate
        entry = {"step": self.step, **values}
        before, self.alarms = self.alarms, ringing([*self._quantized_entries(), entry])
        began = [name for name in self.alarms if name not in before]
        with self.stopwatch("log and tracker"):
            self.log.add({**entry, "alarms": self.alarms} if self.alarms else entry)
            self.accelerator.log({**values, "num_alarms": len(self.alarms)}, step=self.step)
        for name in began if self.accelerator.is_main_process else ():
            progress.write(f"alarm at step {self.step}: {name}: {remedy(name)}")
        shown = {"loss": "loss", "psnr": "PSNR", "codebook_usage": "use %", "images_per_second": "img/s"}
        shown |= {"peak_memory": "GiB"}
        figures = {label: f"{values[name]:.4g}" for name, label in shown.items() if name in values}
        progress.set_postfix(figures, refresh=False)
        self._act(began, result)

    def _quantized_entries(self) -> list[dict]:
        """The entries that alarms compare: those after quantization started, as errors before it are not comparable."""
        start = self.recipe.codebook.quantization_start
        return [entry for entry in self.log.entries[-LONGEST_LOOK:] if entry["step"] > start]

    def _act(self, began: list[str], result: StepResult) -> None:
        """Ends the run, lowers a learning rate or moves dead codes, where the recipe asks for it."""
        record, codebook = self.recipe.record, self.recipe.codebook
        in_a_row = int(self.networks.longest_skip)
        if in_a_row >= record.max_nonfinite_steps:
            raise ValueError(
                f"training stopped at step {self.step}: {in_a_row} steps in a row had a loss or gradient that is not finite; "
                f"{remedy('nonfinite_loss')}"
            )
        if record.lower_discriminator_rate and "discriminator_wins" in began:
            self.networks.learners["discriminator"].scale_rate(0.5)
        if codebook.reseed_dead_codes_after:
            dead = self.recorder.age >= codebook.reseed_dead_codes_after
            optimizer = self.networks.learners["autoencoder"].optimizer
            assert result.output.latents is not None
            reseed(self.model.quantizer, dead, result.output.latents, optimizer)
            self.recorder.age[dead] = 0

    def finish(self) -> None:
        """Saves the result of a completed run: its models, each with recipe and summary.

        These and the log carry the digest of the saved weights. A run that ends before this leaves records without one.
        """
        training = self.recipe.training
        images_per_step = training.batch_size * training.gradient_accumulation_steps * self.accelerator.num_processes
        summary = summarize(self.log.entries, images_per_step, self.accelerator, self.dataset)
        digests = {name: weights_digest(model) for name, model in self.networks.models().items()}
        records = {}
        for name, digest in digests.items():
            tied = {**summary, DIGEST: digest, **({EMA_OF: digests[""]} if name else {})}
            records[name] = {
                RECIPE_FILE: recipe_of(self.settings, digest),
                SUMMARY_FILE: json.dumps(tied, indent=1) + "\n",
            }
        self.log.finish(digests[""])
        save_result(self.output_dir, self.networks, self.image_processor, records)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, scored: bool = True) -> None:
        """Writes a checkpoint, scores it, and removes old ones. All processes must call it."""
        recorder = self.recorder.state_dict()
        positions: list[dict | None] = [self.batches.state_dict() if isinstance(self.batches, Resumable) else None]
        if self.accelerator.num_processes > 1:
            gathered = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(gathered, positions[0])
            positions = gathered
        self.checkpoint = self.output_dir / f"checkpoint-{self.step}"
        if self.accelerator.is_main_process:
            state = RunState(self.step, self.total_steps, positions, recorder, self.alarms, self.settings)
            save_checkpoint(self.checkpoint, self.networks, self.image_processor, state)
            if scored and self.score is not None and self.recipe.training.eval_images:
                model = list(self.networks.models().values())[-1]  # the EMA of the weights, if there is one
                note_score(self.output_dir, self.checkpoint, self.score(model.eval()))
            if self.on_checkpoint is not None:
                self.on_checkpoint(self.checkpoint)
            keep_newest_and_best(self.output_dir, self.recipe.training.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def resume(self, checkpoint: Path) -> None:
        """Restores the state of a checkpoint; the model must have been loaded from it already.

        If the run has another length than the checkpoint's, all schedules continue as those of a run of this length. If its
        settings have other learning rates, the rest of each schedule is multiplied by new / old.

        Raises:
            ValueError: If the checkpoint has all steps of the run already or a different format version, or if its position in
                the data is for other images or, in a stream, for a different number of processes.
        """
        state = load_checkpoint(checkpoint, self.networks)
        if state.step >= self.total_steps:
            raise ValueError(
                f"{checkpoint} has {state.step} steps already, and the run would have {self.total_steps}: raise --max-steps, "
                "or resume from an earlier checkpoint"
            )
        if state.total_steps != self.total_steps:
            self.networks.change_length(self.total_steps)
        self.networks.change_rates(state.settings)
        self.step, self.alarms, self.resumed_from = state.step, state.alarms, checkpoint
        self.recorder.load_state_dict(state.recorder)
        positions, index = state.positions, self.accelerator.process_index
        position = positions[index if index < len(positions) else 0]
        if isinstance(self.batches, Resumable) and position is not None:
            self.batches.load_state_dict(position)

    def restore_result(self) -> None:
        """Takes over the result of a finished run; the model must have been loaded from the output folder already."""
        load_averaged(self.output_dir, self.networks)
        self.step = self.total_steps
        self.log = TrainingLog(self.output_dir, self.step, writes=False)
