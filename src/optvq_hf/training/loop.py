"""The training loop."""

import sys
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from .alarms import LONGEST_LOOK, remedy, ringing
from .arguments import Recipe
from .checkpoints import begin_after, keep_newest_and_best, load_state, note_score, save_checkpoint, save_result
from .codebook import follow_schedule, reseed, start_codebook
from .history import History
from .networks import Networks
from .recorder import Recorder
from .signals import StopRequest
from .trackers import log_images, start_tracker


def train(
    model: OptVQModel,
    image_processor: OptVQImageProcessor,
    batches: Iterable[torch.Tensor],
    total_steps: int,
    recipe: Recipe,
    accelerator: Accelerator,
    checkpoint: Path | None = None,
    score: Callable[[OptVQModel], float] | None = None,
    settings: dict | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
) -> "Run":
    """Trains `model` in place and saves it, with its image processor, to the recipe's output folder.

    Args:
        model: In any mode; left in evaluation mode. To go on from a checkpoint, the checkpoint's model.
        image_processor: Saved beside the model.
        batches: (B, num_channels, H, W) float in [-1, 1], this process's share alone, as many as the run needs. If it has
            `state_dict` and `load_state_dict` (see [`~data.batches.TrainingBatches`]), a resumed run goes on with the very
            next batch.
        total_steps: Optimizer steps of the whole run.
        checkpoint: Folder to go on from.
        score: Mean squared error of a model on unseen images, which decides the best checkpoint.
        settings: JSON, kept in checkpoints; by default the recipe's flags.
        on_checkpoint: Called in the first process with the folder of every checkpoint.

    Returns:
        The run; its `completed` is False if it was asked to end before.

    Raises:
        ValueError: If the training cannot go on; the message says at which step and what may help.
        OSError: If the disk is full or cannot be written to.
    """
    run = Run(model, image_processor, batches, total_steps, recipe, accelerator, score, settings, on_checkpoint)
    if checkpoint is not None:
        run.resume(checkpoint)
    run.train()
    return run


class Run:
    """One training run: the networks, the data, the record, and how far it is.

    Every step seeds all random generators with the run's seed, its own number and the process's. So a run needs no memory of
    them, and goes on after an interruption as it would have.

    Attributes:
        step: Steps done.
        history: The log.
        completed: Whether all steps are done.
        checkpoint: The folder written last, if any.
    """

    def __init__(
        self,
        model,
        image_processor,
        batches,
        total_steps,
        recipe: Recipe,
        accelerator,
        score=None,
        settings=None,
        on_checkpoint=None,
    ):
        self.model, self.image_processor, self.batches = model, image_processor, batches
        self.total_steps, self.recipe, self.accelerator = total_steps, recipe, accelerator
        self.score, self.on_checkpoint = score, on_checkpoint
        self.settings = recipe.as_flags() if settings is None else settings
        self.output_dir = Path(recipe.training.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.networks = Networks(model, recipe, total_steps, accelerator)
        self.recorder = Recorder(model.config.codebook_size, accelerator.device)
        self.step = 0
        self.history: History | None = None
        self.checkpoint: Path | None = None
        self.alarms: list[str] = []

    @property
    def completed(self) -> bool:
        return self.step >= self.total_steps

    def train(self):
        """All steps from here on."""
        accelerator, record = self.accelerator, self.recipe.record
        self.history = History(self.output_dir, self.step, writes=accelerator.is_main_process)
        if accelerator.is_main_process:
            begin_after(self.output_dir, self.step)
        start_tracker(accelerator, self.recipe, self.step)
        progress = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; a file of a scheduler wants few lines
        )
        source = iter(self.batches)
        with StopRequest(accelerator.device) as stop:
            while not self.completed:
                self._seed()
                self._prepare_codebook(source)
                batches = self._next_batches(source)
                is_logged = (self.step + 1) % record.log_every == 0 or self.step + 1 == self.total_steps
                result = self._take_step(batches, is_logged)
                self.recorder.count(result, sum(map(len, batches)) * accelerator.num_processes)
                self.step += 1
                progress.update()
                if is_logged:
                    self._log(result, progress)
                if record.images_every and (self.step % record.images_every == 0 or self.completed):
                    log_images(
                        accelerator, self.output_dir, self.step, result.pixel_values, result.output.reconstruction
                    )
                stopping = stop.agreed()
                save_every = self.recipe.training.save_every
                if (save_every and self.step % save_every == 0 and not self.completed) or stopping:
                    self.save(scored=not stopping)
                if stopping:
                    break
        progress.close()
        accelerator.unwrap_model(self.networks.trained, keep_fp32_wrapper=False).eval()
        if self.completed and accelerator.is_main_process:
            save_result(self.output_dir, self.networks, self.image_processor)
        accelerator.wait_for_everyone()
        self.networks.trained = self.model  # nothing may hold the process group when it is taken down
        accelerator.end_training()

    def save(self, scored: bool = True):
        """Writes a checkpoint, scores it, and removes old ones. All processes take part."""
        record = self.recorder.state_dict()
        places = [self.batches.state_dict()] if hasattr(self.batches, "state_dict") else [None]
        if self.accelerator.num_processes > 1:
            gathered = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(gathered, places[0])
            places = gathered
        self.checkpoint = self.output_dir / f"checkpoint-{self.step}"
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "total_steps": self.total_steps,
                "places": places,
                "record": record,
                "alarms": self.alarms,
                "settings": self.settings,
            }
            save_checkpoint(self.checkpoint, self.networks, self.image_processor, state)
            if scored and self.score is not None and self.recipe.training.eval_images:
                model = list(self.networks.models().values())[-1]  # the averaged weights, where there are any
                note_score(self.output_dir, self.checkpoint, self.score(model.eval()))
            if self.on_checkpoint is not None:
                self.on_checkpoint(self.checkpoint)
            keep_newest_and_best(self.output_dir, self.recipe.training.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def resume(self, checkpoint: Path):
        """Puts everything where it was when the checkpoint was written.

        Raises:
            ValueError: If the run is of another length, or if the place in a stream is of another number of processes.
        """
        state = load_state(checkpoint, self.networks)
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"{checkpoint} is of a run of {state['total_steps']} steps, whose learning rate follows from that; go on with "
                f"--max-steps {state['total_steps']}, not {self.total_steps}, or begin a new run with --model {checkpoint}"
            )
        self.step, self.alarms = state["step"], state["alarms"]
        self.recorder.load_state_dict(state["record"])
        places, index = state["places"], self.accelerator.process_index
        if hasattr(self.batches, "load_state_dict") and places[0] is not None:
            self.batches.load_state_dict(places[index if index < len(places) else 0])

    def _seed(self):
        numbers = (self.recipe.training.seed, self.step, self.accelerator.process_index)
        set_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

    def _prepare_codebook(self, source: Iterable[torch.Tensor]):
        codebook = self.recipe.codebook
        for model in self.networks.models().values():
            follow_schedule(model.quantizer, codebook, self.step, self.total_steps)
        if codebook.codebook_start != "normal" and self.step == codebook.quantization_start:
            start_codebook(self.model, source, codebook, self.recipe.training.seed)

    def _next_batches(self, source: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        before = time.perf_counter()
        number = self.recipe.training.gradient_accumulation_steps
        batches = list(islice(source, number))
        if len(batches) < number:
            raise ValueError(f"the batches ended after step {self.step} of {self.total_steps}")
        self.recorder.wait(time.perf_counter() - before)
        return batches

    def _take_step(self, batches: list[torch.Tensor], is_logged: bool):
        try:
            return self.networks.step(batches, self.step, measured=is_logged)
        except ValueError as error:
            help = "; a lower learning rate may help" if self.step else ""
            raise ValueError(f"training stopped at step {self.step + 1}: {error}{help}") from error

    def _log(self, result, progress: tqdm):
        unreadable = 100 * getattr(self.batches, "num_unreadable", 0) / max(getattr(self.batches, "num_images", 0), 1)
        values = self.recorder.entry(result, self.networks.skipped, unreadable)
        for name, learner in self.networks.learners.items():
            values["learning_rate" if name == "autoencoder" else f"{name}_learning_rate"] = learner.last_rate
        entry = {"step": self.step, **values}
        before, self.alarms = self.alarms, ringing([*self._quantized_entries(), entry])
        began = [name for name in self.alarms if name not in before]
        self.history.add({**entry, "alarms": self.alarms} if self.alarms else entry)
        for name in began if self.accelerator.is_main_process else ():
            progress.write(f"alarm at step {self.step}: {name}: {remedy(name)}")
        self.accelerator.log({**values, "num_alarms": len(self.alarms)}, step=self.step)
        shown = {"loss": "loss", "psnr": "PSNR", "codebook_usage": "use %", "images_per_second": "img/s"}
        progress.set_postfix({label: f"{values[name]:.4g}" for name, label in shown.items()}, refresh=False)
        self._act(began, result)

    def _quantized_entries(self) -> list[dict]:
        """What alarms look back on: not on steps before quantization began, whose errors are another matter."""
        start = self.recipe.codebook.quantization_start
        return [entry for entry in self.history.entries[-LONGEST_LOOK:] if entry["step"] > start]

    def _act(self, began: list[str], result):
        """What was asked to be done about trouble."""
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
            reseed(self.model.quantizer, dead, result.output.latents, optimizer)
            self.recorder.age[dead] = 0
