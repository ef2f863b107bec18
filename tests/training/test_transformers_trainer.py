"""`transformers.Trainer`, unmodified, trains the whole model."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from optvq_hf import OptVQConfig, OptVQImageProcessor, OptVQModel


REPOSITORY = Path(__file__).parents[2]


class Pictures(Dataset):
    def __init__(self, number=16):
        self.pixels = torch.rand(number, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index]}


def collate(rows):
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "return_loss": True}


def make_model(**fields):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "num_channels": 1, "codebook_size": 32, "codebook_dim": 4, "num_codebook_heads": 1}
    return OptVQModel(OptVQConfig(backbone="plain_cnn", **sizes, **fields))


def make_trainer(model, folder, compute_metrics=None, **settings):
    defaults = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 3, "report_to": "none"}
    arguments = TrainingArguments(str(folder), **{**defaults, "use_cpu": True, "learning_rate": 1e-2, **settings})
    pictures = Pictures()
    return Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=pictures,
        eval_dataset=pictures,
        compute_metrics=compute_metrics,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=str,
)
def test_every_part_learns_and_eval_loss_is_reported(tmp_path, settings):
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, tmp_path, **settings)
    trainer.train()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    metrics = trainer.evaluate()
    with torch.no_grad():
        losses = [model.eval()(batch, return_loss=True).loss for batch in Pictures().pixels.split(4)]
    assert metrics["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_metrics_are_computed_of_reconstructions_and_codes(tmp_path):
    seen = []

    def measure(prediction):
        reconstruction, codes = prediction.predictions
        seen.append((reconstruction.shape, codes.shape))
        return {"used": len(set(codes.flatten().tolist()))}

    metrics = make_trainer(make_model(), tmp_path, measure).evaluate()
    assert seen == [((16, 1, 16, 16), (16, 1, 4, 4))] and metrics["eval_used"] > 0
    predictions = make_trainer(make_model(), tmp_path).predict(Pictures()).predictions
    assert [array.shape for array in predictions] == [(16, 1, 16, 16), (16, 1, 4, 4)]


def test_a_saved_checkpoint_goes_on(tmp_path):
    whole = make_model(codebook_update="ema", use_codebook_projection=False, sinkhorn_warm_start=True)
    make_trainer(whole, tmp_path / "whole", max_steps=4).train()
    parts = make_model(codebook_update="ema", use_codebook_projection=False, sinkhorn_warm_start=True)
    make_trainer(parts, tmp_path / "parts", max_steps=4, save_steps=2).train()
    again = make_model(codebook_update="ema", use_codebook_projection=False, sinkhorn_warm_start=True)
    trainer = make_trainer(again, tmp_path / "parts", max_steps=4, save_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, msg=name)


def test_the_example(tmp_path):
    example = runpy.run_path(str(REPOSITORY / "scripts" / "examples" / "train_with_transformers.py"))
    metrics = example["main"](["--max-steps", "2", "--output-dir", str(tmp_path)])
    assert math.isfinite(metrics["eval_loss"])
    assert OptVQModel.from_pretrained(tmp_path).config.codebook_size == 1024
    assert OptVQImageProcessor.from_pretrained(tmp_path).num_channels == 1
