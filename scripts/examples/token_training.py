"""What generate_images.py and generate_images_masked.py share: tokens with classes, the training loop, pictures, a judge.

All that a run makes lies in one output folder, and a run that was interrupted resumes from there:

    tokenizer/           a tokenizer with one head, if no other is given
    tokens/              the dataset as tokens, written by `optvq tokenize`
    NAME/checkpoint-N/   the state of training after N steps
    NAME/                the generator, images.png and results.json
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from datasets import ClassLabel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import make_grid
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from optvq_hf import OptVQImageProcessor, OptVQModel
from optvq_hf.commands import tokenize
from optvq_hf.commands import train as train_tokenizer
from optvq_hf.data.arguments import SourceArguments
from optvq_hf.data.loading import load_images
from optvq_hf.tokenization import load_tokens


JUDGE_IMAGES = 20_000  # real images that the classifier is trained on, at most
PER_BATCH = 250  # images that are generated at once


@dataclass
class Tokens:
    """A dataset of tokens with classes, and the tokenizer that made them.

    Attributes:
        ids: int64 (images, length) in [0, tokenizer.config.vocab_size).
        labels: int64 (images,) in [0, num_classes).
    """

    tokenizer: OptVQModel
    image_processor: OptVQImageProcessor
    ids: Tensor
    labels: Tensor
    num_classes: int


def make_parser(description: str) -> argparse.ArgumentParser:
    """Flags of both examples."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", default="ylecun/mnist", help="Hub id or folder of images with classes")
    parser.add_argument("--label-column", default="label", help="Column of the classes")
    parser.add_argument("--output-dir", default=Path("runs/generation"), type=Path, help="Folder for all results")
    parser.add_argument("--model", help="Hub id or folder of the tokenizer; by default one with one head is trained")
    parser.add_argument("--tokenizer-steps", default=400, type=int, help="Steps of training a tokenizer")
    parser.add_argument("--max-steps", default=1000, type=int, help="Steps of training the generator")
    parser.add_argument("--batch-size", default=64, type=int, help="Images per step and process")
    parser.add_argument("--learning-rate", default=2e-3, type=float, help="Highest learning rate")
    parser.add_argument("--hidden-size", default=128, type=int, help="Width of the generator")
    parser.add_argument("--num-layers", default=4, type=int, help="Layers of the generator")
    parser.add_argument("--class-dropout", default=0.1, type=float, help="Share of images trained on without class")
    parser.add_argument("--save-every", default=250, type=int, help="Steps between checkpoints")
    parser.add_argument("--seed", default=0, type=int, help="Of training and of generation")
    parser.add_argument("--per-class", default=10, type=int, help="Images to generate of every class")
    parser.add_argument("--temperature", default=1.0, type=float, help="Lower ones draw likely codes more often")
    parser.add_argument("--guidance-scale", default=1.5, type=float, help="Above 1, images are more typical of a class")
    parser.add_argument("--evaluate", action="store_true", help="Train a classifier on real images and ask it")
    return parser


def read_tokens(arguments: argparse.Namespace) -> Tokens:
    """Trains a tokenizer and tokenizes the dataset, where that is not done yet, and reads the tokens."""
    model, tokens = arguments.model or str(arguments.output_dir / "tokenizer"), arguments.output_dir / "tokens"
    source = ["--dataset", arguments.dataset]
    if arguments.model is None and not Path(model, "metrics.json").exists():
        steps = ["--num-codebook-heads", "1", "--codebook-size", "512", "--max-steps", str(arguments.tokenizer_steps)]
        saving = ["--output-dir", model, "--resume", "auto", "--save-every", "100", "--report-to", "none"]
        train_tokenizer.main(["--config", "mnist", *source, *steps, *saving])
    if not (tokens / "manifest.json").exists():
        tokenize.main(["--model", model, *source, "--columns", arguments.label_column, "--output-dir", str(tokens)])
    Accelerator().wait_for_everyone()
    dataset = load_tokens(tokens, model)  # refuses the tokens of another model
    rows, feature = dataset.with_format("torch")[:], dataset.features[arguments.label_column]
    tokenizer, labels = OptVQModel.from_pretrained(model).eval(), rows[arguments.label_column].long()
    return Tokens(
        tokenizer,
        OptVQImageProcessor.from_pretrained(model),
        tokenizer.to_token_ids(rows["codes"]),
        labels,
        feature.num_classes if isinstance(feature, ClassLabel) else int(labels.max()) + 1,
    )


def train(
    model: PreTrainedModel,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
    tokens: Tokens,
    arguments: argparse.Namespace,
    folder: Path,
) -> PreTrainedModel:
    """Trains a generator, from its newest checkpoint on, and saves it.

    Everything random of a step follows from its number, and so does its batch: a run that resumes computes the same.

    Args:
        loss_of: Computes the loss of a batch from the model, ids (B, length) and classes (B,).
    """
    in_order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=arguments.seed)
    accelerator = Accelerator(dataloader_config=in_order)
    images = TensorDataset(tokens.ids, tokens.labels)
    loader = DataLoader(images, min(arguments.batch_size, len(images)), shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    total = arguments.max_steps * accelerator.num_processes  # accelerate counts the steps of all processes
    schedule = get_cosine_schedule_with_warmup(optimizer, total // 20, total)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    checkpoints = sorted(folder.glob("checkpoint-*[0-9]"), key=step_of)
    first = step_of(checkpoints[-1]) if checkpoints else 0
    if first:
        accelerator.load_state(str(checkpoints[-1]))
        accelerator.print(f"resuming from {checkpoints[-1]}")
    model.train()
    steps = range(first, arguments.max_steps)
    progress = tqdm(steps, initial=first, total=arguments.max_steps, disable=not accelerator.is_main_process or None)
    for step, (ids, labels) in zip(progress, batches(accelerator, loader, first)):
        set_seed(arguments.seed + step, device_specific=True)
        loss = loss_of(model, ids, labels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            accelerator.print(f"step {step + 1}: loss {loss.item():.3f}")
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.max_steps:
            save_checkpoint(accelerator, folder, step + 1)
    model = accelerator.unwrap_model(model).eval()
    if accelerator.is_main_process:
        model.save_pretrained(folder)
    return model


def batches(accelerator: Accelerator, loader: DataLoader, step: int) -> Iterator[list[Tensor]]:
    """The batches from a step on, epoch after epoch."""
    while True:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, done):
            yield batch
            step += 1


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Saves under another name first, so that every checkpoint is whole; earlier ones are removed."""
    unfinished = folder / "unfinished"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        earlier = list(folder.glob("checkpoint-*[0-9]"))
        unfinished.rename(folder / f"checkpoint-{step}")
        for checkpoint in earlier:
            shutil.rmtree(checkpoint)
    accelerator.wait_for_everyone()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def drop_classes(labels: Tensor, no_class: int, share: float) -> Tensor:
    """Classes (B,), a random share of them replaced by `no_class`: guidance compares with images of any class."""
    return torch.where(torch.rand(labels.shape, device=labels.device) < share, no_class, labels)


@torch.inference_mode()
def show(generate: Callable[[Tensor], Tensor], tokens: Tokens, arguments: argparse.Namespace, folder: Path) -> dict:
    """Generates images of every class, saves a grid with a row per class, and asks the judge.

    Args:
        generate: Makes ids (B, length) in [0, tokenizer.config.vocab_size) of classes (B,).

    Returns:
        Results, in percent; also in results.json.
    """
    set_seed(arguments.seed)
    tokenizer, side = tokens.tokenizer, tokens.tokenizer.config.latent_size
    labels = torch.arange(tokens.num_classes).repeat_interleave(arguments.per_class)
    ids = torch.cat([generate(part).cpu() for part in tqdm(labels.split(PER_BATCH), desc="generating", disable=None)])
    images = torch.cat([tokenizer.decode_image_tokens(part, side, side) for part in ids.split(PER_BATCH)])
    of_class = images.unflatten(0, (tokens.num_classes, -1))[:, :10]
    grid = make_grid(of_class.flatten(0, 1), nrow=of_class.shape[1], padding=2, pad_value=1.0)
    tokens.image_processor.postprocess(grid[None])[0].save(folder / "images.png")
    results = {"generated": len(images)}
    if arguments.evaluate:
        judge, accuracy = train_judge(tokens, arguments)
        seen = judge(images).argmax(1)
        results["recognised_percent"] = round(100 * (seen == labels).float().mean().item(), 2)
        results["real_images_percent"] = round(accuracy, 2)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{folder / 'images.png'} {results}")
    return results


@torch.inference_mode(False)
def train_judge(tokens: Tokens, arguments: argparse.Namespace) -> tuple[nn.Module, float]:
    """A classifier trained on real images, and the percentage of real test images that it recognises."""
    (images, labels), (test_images, test_labels) = (
        real_images(tokens, arguments, split) for split in ("train", "test")
    )
    judge = nn.Sequential(
        *(nn.LazyConv2d(16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.LazyConv2d(32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.LazyLinear(tokens.num_classes)),
    )
    judge(images[:1])  # makes the layers
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    for _ in range(3):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(judge(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return judge, 100 * (judge(test_images).argmax(1) == test_labels).float().mean().item()


def real_images(tokens: Tokens, arguments: argparse.Namespace, split: str) -> tuple[Tensor, Tensor]:
    """Pixel values (images, C, H, W) and classes of a random part of a split, prepared as for the tokenizer."""
    rows = load_images(SourceArguments(dataset=arguments.dataset), split, [arguments.label_column])
    rows = rows.shuffle(seed=0).select(range(min(len(rows), JUDGE_IMAGES)))
    parts = rows.iter(batch_size=PER_BATCH)
    pixels = [tokens.image_processor(part["image"], return_tensors="pt")["pixel_values"] for part in parts]
    return torch.cat(pixels), torch.tensor(rows[arguments.label_column])
