"""The training loop."""

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from torchvision.utils import make_grid, save_image
from tqdm.auto import tqdm

from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from .arguments import TrainingArguments
from .history import History
from .objective import Objective
from .optimization import make_optimizer, make_schedule


def make_accelerator(arguments: TrainingArguments) -> Accelerator:
    """Processes, device and tracker, as `accelerate launch` or torchrun set them up.

    Raises:
        ImportError: If the tracker is not installed.
        ValueError: If several processes were started but do not know of each other.
    """
    if arguments.report_to == "tensorboard" and not is_tensorboard_available():
        raise ImportError(
            'TensorBoard is not installed: run pip install "optvq_hf[train]", or pass --report-to none to do without'
        )
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=1,
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_dir=arguments.output_dir,
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but each trains alone; on a machine without GPUs set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def train(
    model: OptVQModel,
    image_processor: OptVQImageProcessor,
    batches: Iterable[torch.Tensor],
    total_steps: int,
    arguments: TrainingArguments,
    accelerator: Accelerator,
) -> History:
    """Trains `model` in place and saves it, with its image processor, to `arguments.output_dir`.

    Args:
        model: In any mode; left in evaluation mode.
        image_processor: Saved beside the model.
        batches: (B, num_channels, H, W) float in [-1, 1], at least `total_steps` of them, this process's share alone.
        total_steps: Optimizer steps.

    Returns:
        The log, one entry per `arguments.log_every` steps.
    """
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    history = History(output_dir if accelerator.is_main_process else None)
    accelerator.init_trackers("tensorboard")

    # The schedule is stepped by hand, once per step: a prepared one would step once per process.
    optimizer = make_optimizer(model, arguments.learning_rate, arguments.weight_decay, arguments.adam_beta2)
    schedule = make_schedule(optimizer, arguments.learning_rate, total_steps, arguments.warmup_ratio)
    objective = Objective(arguments.l1_weight, arguments.l2_weight, arguments.quantizer_weight)
    trained, optimizer = accelerator.prepare(model, optimizer)
    trained.train()

    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64, device=accelerator.device)
    progress = tqdm(total=total_steps, desc="training", unit="step", disable=not accelerator.is_main_process)
    last_log = time.perf_counter()

    for step, pixel_values in zip(range(1, total_steps + 1), batches):
        pixel_values = pixel_values.to(accelerator.device, non_blocking=True)
        try:
            output = trained(pixel_values)
        except ValueError as error:
            remedy = "; a lower learning rate may help" if step > 1 else ""
            raise ValueError(f"training stopped at step {step}: {error}{remedy}") from error
        loss, parts = objective.autoencoder_loss(output.reconstruction, pixel_values, output.loss)
        accelerator.backward(loss)
        gradient_norm = accelerator.clip_grad_norm_(trained.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        learning_rate = schedule.get_last_lr()[0]
        schedule.step()

        codes = output.codes.flatten()
        counts.scatter_add_(0, codes, torch.ones_like(codes))
        progress.update()

        if step % arguments.log_every == 0 or step == total_steps:
            values = {"loss": loss.detach(), **parts, "perplexity": output.perplexity, "gradient_norm": gradient_norm}
            values = {name: value.item() for name, value in accelerator.reduce(values, "mean").items()}
            if not math.isfinite(values["loss"]):
                raise ValueError(f"the loss became {values['loss']} by step {step}; a lower learning rate may help")
            used = (accelerator.reduce(counts, "sum") > 0).float().mean().item()
            counts.zero_()
            elapsed, last_log = time.perf_counter() - last_log, time.perf_counter()
            steps_logged = (step - 1) % arguments.log_every + 1
            values |= {
                "psnr": 10 * math.log10(4 / max(values["l2"], 1e-12)),  # pixels span [-1, 1], so the peak is 2
                "codebook_usage": 100 * used,
                "learning_rate": learning_rate,
                "images_per_second": steps_logged * len(pixel_values) * accelerator.num_processes / elapsed,
            }
            history.add({"step": step, **values})
            accelerator.log(values, step=step)
            shown = {"loss": "loss", "psnr": "PSNR", "codebook_usage": "use %", "images_per_second": "img/s"}
            progress.set_postfix({label: f"{values[name]:.4g}" for name, label in shown.items()})

        if arguments.images_every and (step % arguments.images_every == 0 or step == total_steps):
            log_images(accelerator, output_dir, step, pixel_values, output.reconstruction)
        if arguments.save_every and step % arguments.save_every == 0:
            save(accelerator, model, image_processor, output_dir / f"checkpoint-{step}")

    progress.close()
    accelerator.end_training()
    accelerator.unwrap_model(trained, keep_fp32_wrapper=False).eval()
    save(accelerator, model, image_processor, output_dir)
    return history


def log_images(accelerator, output_dir: Path, step: int, images: torch.Tensor, reconstructions: torch.Tensor):
    """Eight originals over their reconstructions, to OUTPUT_DIR/images and TensorBoard."""
    if not accelerator.is_main_process:
        return
    pair = torch.cat([images[:8], reconstructions[:8].detach().float()])
    grid = make_grid((pair / 2 + 0.5).clamp(0, 1), nrow=min(8, len(images)))
    (output_dir / "images").mkdir(exist_ok=True)
    save_image(grid, output_dir / "images" / f"step-{step:07d}.png")
    for tracker in accelerator.trackers:
        tracker.log_images({"reconstructions": grid[None]}, step=step)


def save(accelerator: Accelerator, model: OptVQModel, image_processor: OptVQImageProcessor, folder: Path):
    """A folder that `from_pretrained` loads."""
    if accelerator.is_main_process:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
