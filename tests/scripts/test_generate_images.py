"""Both examples of generation: from images to generated images, resumed as if never interrupted."""

import json
import math
import runpy
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from builders import make, noise, plain_config
from optvq_hf.training.models import make_image_processor


EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"
NAMES = {"generate_images": "autoregressive", "generate_images_masked": "masked"}
BOTH = pytest.mark.parametrize("name", NAMES)
SMALL = ["--hidden-size", "16", "--num-layers", "1", "--batch-size", "8", "--save-every", "6", "--per-class", "3"]


@pytest.fixture(autouse=True)
def runs(fresh_run):
    """Tests here run commands and examples."""


@pytest.fixture
def example(monkeypatch):
    """example(name) is what the program defines."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))
    sys.modules.pop("token_training", None)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A tokenizer of 16 x 16 pixels (4 x 4 tokens of 2 codes), and 45 pictures of 3 classes, as flags."""
    model, pictures = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("pictures")
    tokenizer = make(plain_config(image_size=16, num_channels=1))
    tokenizer.save_pretrained(model)
    make_image_processor(tokenizer.config).save_pretrained(model)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    for split, number in (("train", 45), ("test", 9)):
        images = [PILImage.fromarray(noise(1, 16, seed)[:, :, 0]) for seed in range(number)]
        labels = [seed % 3 for seed in range(number)]
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(pictures / f"{split}-00000-of-00001.parquet")
    return ["--model", str(model), "--dataset", str(pictures), *SMALL]


@BOTH
def test_from_images_to_images(example, flags, tmp_path, name):
    """Ids that belong to no code of their position would not decode."""
    results = example(name)["main"]([*flags, "--output-dir", str(tmp_path), "--max-steps", "6", "--evaluate"])
    folder = tmp_path / NAMES[name]
    assert results["generated"] == 9
    assert 0 <= results["recognised_percent"] <= 100 and 0 <= results["real_images_percent"] <= 100
    assert json.loads((folder / "results.json").read_text()) == results
    with PILImage.open(folder / "images.png") as grid:
        assert grid.size == (3 * 18 + 2, 3 * 18 + 2)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.long
def test_one_command_makes_all_it_needs(example, tmp_path):
    steps = ["--tokenizer-steps", "1", "--max-steps", "1"]
    flags = ["--dataset", "fashion_mnist_sample", "--output-dir", str(tmp_path), *SMALL, *steps]
    assert example("generate_images_masked")["main"](flags) == {"generated": 30}
    assert example("generate_images")["main"](flags) == {"generated": 30}
    folders = {path.name for path in tmp_path.iterdir()}
    assert folders == {"tokenizer", "tokens", "autoregressive", "masked"}


@BOTH
def test_resumed_as_if_never_interrupted(example, flags, tmp_path, monkeypatch, name):
    """Interrupted in step 8, after a checkpoint at step 6; an epoch has 5."""
    program = example(name)["main"]
    steps = ["--max-steps", "9"]
    program([*flags, *steps, "--output-dir", str(tmp_path / "whole")])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokens").symlink_to(tmp_path / "whole" / "tokens")
    backward, calls = Accelerator.backward, []

    def fail(self, loss):
        calls.append(loss)
        if len(calls) == 8:
            raise KeyboardInterrupt
        backward(self, loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Accelerator, "backward", fail)
        program([*flags, *steps, "--output-dir", str(tmp_path / "broken")])
    broken = tmp_path / "broken" / NAMES[name]
    assert [path.name for path in broken.glob("checkpoint-*")] == ["checkpoint-6"]
    program([*flags, *steps, "--output-dir", str(tmp_path / "broken")])
    weights, expected = (load_file(tmp_path / run / NAMES[name] / "model.safetensors") for run in ("broken", "whole"))
    assert weights.keys() == expected.keys() and all(weights[key].equal(expected[key]) for key in expected)
    pictures = [(tmp_path / run / NAMES[name] / "images.png").read_bytes() for run in ("broken", "whole")]
    assert pictures[0] == pictures[1]


def test_batches_from_any_step(example):
    """Every epoch has an order of its own, and all images once."""
    batches = example("token_training")["batches"]
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0))
    loader = accelerator.prepare(DataLoader(torch.arange(12), 3, shuffle=True))
    whole = torch.stack(list(islice(batches(accelerator, loader, 0), 8)))
    first, second = whole.view(2, 12)
    assert first.sort().values.equal(second.sort().values) and not first.equal(second)
    for step in range(8):
        assert next(batches(accelerator, loader, step)).equal(whole[step])


@pytest.fixture(scope="module")
def tokens():
    """Tokens as the examples read them: 4 x 4 of 2 heads."""
    config = plain_config(image_size=16)
    return SimpleNamespace(tokenizer=make(config), ids=torch.zeros(1, 32, dtype=torch.long), num_classes=3)


@torch.no_grad()
def test_guidance_of_the_language_model(example, tokens):
    """With top_k=1 the likeliest code of the guided scores is drawn: u + scale * (c - u), among the ids of its head."""
    program = example("generate_images")
    torch.manual_seed(0)
    model = program["make_model"](tokens, 16, 1).eval()
    for weight in model.parameters():
        weight.mul_(8)  # untrained, all classes would have about the same scores
    labels = torch.tensor([0, 2])
    ids = program["generate"](model, tokens, labels, top_k=1, guidance_scale=3.0)
    plain = program["generate"](model, tokens, labels, top_k=1)
    assert not ids.equal(plain)
    tokens.tokenizer.from_token_ids(ids)
    with_class, without = (
        model(input_ids=torch.cat([first[:, None], 4 + ids], dim=1)).logits[:, :-1].log_softmax(-1)
        for first in (labels, torch.full_like(labels, 3))
    )
    scores = (without + 3.0 * (with_class - without))[:, :, 4:].unflatten(2, (2, 128))
    of_head = scores[:, torch.arange(32), torch.arange(32) % 2]
    assert of_head.argmax(-1).equal(ids - torch.arange(32) % 2 * 128)


@torch.no_grad()
def test_guidance_of_masked_generation(example, tokens):
    program = example("generate_images_masked")
    torch.manual_seed(0)
    model = program["make_model"](tokens, 16, 1).eval()
    for weight in model.parameters():
        weight.mul_(8)
    labels = torch.tensor([0, 2])
    settings = {"num_steps": 1, "temperature": 1e-6}  # the likeliest codes, all at once
    ids = program["generate"](model, tokens, labels, guidance_scale=3.0, **settings)
    assert not ids.equal(program["generate"](model, tokens, labels, **settings))
    all_masked = torch.full((2, 32), 4)
    with_class, without = (
        model(input_ids=torch.cat([first[:, None], all_masked], dim=1)).logits[:, 1:, 5:]
        for first in (labels, torch.full_like(labels, 3))
    )
    scores = (without + 3.0 * (with_class - without)).unflatten(2, (2, 128))
    of_head = scores[:, torch.arange(32), torch.arange(32) % 2]
    assert of_head.argmax(-1).equal(ids - torch.arange(32) % 2 * 128)
    assert tokens.tokenizer.from_token_ids(ids).shape == (2, 2, 4, 4)


def test_masks_shrink_as_a_cosine(example, tokens, monkeypatch):
    """Every step of masked generation keeps what it drew before, and leaves cos(pi/2 * step / steps) of the ids masked."""
    program = example("generate_images_masked")
    model = program["make_model"](tokens, 16, 1).eval()
    seen, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda input_ids: seen.append(input_ids[:, 1:]) or forward(input_ids=input_ids)
    )
    program["generate"](model, tokens, torch.tensor([0, 1]), num_steps=4)
    of_steps = seen[::2]  # each is asked with and without class
    expected = [math.floor(32 * math.cos(math.pi / 2 * step / 4)) for step in range(4)]
    assert [(ids == 4).sum(1).tolist() for ids in of_steps] == [[number] * 2 for number in expected]
    for before, after in zip(of_steps, of_steps[1:]):
        assert after[before != 4].equal(before[before != 4])


def test_a_share_of_the_classes_is_dropped(example):
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(1000)
    dropped = example("token_training")["drop_classes"](labels, 3, 0.25)
    assert 0.2 < (dropped == 3).float().mean() < 0.3 and dropped[dropped != 3].equal(labels[dropped != 3])
