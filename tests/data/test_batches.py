import io
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from optvq_hf import OptVQImageProcessor
from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import ImageCollator, evaluation_batches, training_batches


@pytest.fixture(autouse=True)
def no_pause_at_the_end_of_a_stream(monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def processor(size=8, num_channels=1):
    return OptVQImageProcessor(
        num_channels=num_channels, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> str:
    """40 images, image n of the constant grey value n, in 4 shards."""
    folder = tmp_path_factory.mktemp("numbered")
    for shard in range(4):
        images = [Image.new("L", (8, 8), shard * 10 + n) for n in range(10)]
        rows = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
        rows.to_parquet(folder / f"train-0000{shard}-of-00004.parquet")
    return str(folder)


def numbers(batches):
    """Which images the batches hold."""
    return [((batch[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for batch in batches]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_holds_every_image_once_in_a_new_order(numbered, streaming, num_workers):
    arguments = DataArguments(dataset=numbered, streaming=streaming, num_workers=num_workers, shuffle_buffer=100)
    batches = training_batches(arguments, processor(), 5, seed=3)
    assert batches.batches_per_epoch == (None if streaming else 8)
    seen = numbers(islice(batches, 24))
    epochs = [sum(seen[i : i + 8], []) for i in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(40))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_seed_decides_the_order(numbered, streaming):
    arguments = DataArguments(dataset=numbered, streaming=streaming)
    orders = [numbers(islice(training_batches(arguments, processor(), 8, seed=s), 5)) for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_the_images_without_overlap(numbered, streaming, num_processes):
    arguments = DataArguments(dataset=numbered, streaming=streaming)
    shares = []
    for rank in range(num_processes):
        batches = training_batches(arguments, processor(), 1, 0, process_index=rank, num_processes=num_processes)
        shares.append(sum(numbers(islice(batches, 40 // num_processes)), []))
    together = sum(shares, [])
    assert len(set(together)) == len(together) == 40 // num_processes * num_processes


def test_evaluation_batches_hold_every_image_in_order(numbered):
    arguments = DataArguments(dataset=numbered, eval_split="train")
    batches = numbers(evaluation_batches(arguments, processor(), 16))
    assert [len(batch) for batch in batches] == [16, 16, 8] and sum(batches, []) == list(range(40))
    assert sum(numbers(evaluation_batches(arguments, processor(), 16, max_images=5)), []) == list(range(5))


@pytest.mark.parametrize(
    ("streaming", "what"), [(False, "split 'train' of dataset .* has 40 images"), (True, "stream")]
)
def test_too_few_images_for_a_batch(numbered, streaming, what):
    arguments = DataArguments(dataset=numbered, streaming=streaming)
    with pytest.raises(ValueError, match=f"{what}.* fewer .*batch of 41"):
        next(iter(training_batches(arguments, processor(), 41)))


def test_processes_with_unequal_shares_agree_on_the_length_of_an_epoch(numbered):
    arguments = DataArguments(dataset=numbered, train_split="train[:39]")
    for rank in (0, 1):  # 20 images and 19
        batches = training_batches(arguments, processor(), 5, process_index=rank, num_processes=2)
        assert batches.batches_per_epoch == 3


def test_augmentation():
    brighter_to_the_right = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1)))  # 64 x 32
    file = io.BytesIO()
    brighter_to_the_right.save(file, "PNG")
    records = [{"image": {"bytes": file.getvalue(), "path": None}}] * 32
    torch.manual_seed(0)
    plain = ImageCollator(processor(32))(records)
    cropped = ImageCollator(processor(32), random_crop=True)(records)
    flipped = ImageCollator(processor(32), random_flip=True)(records)

    assert plain.shape == cropped.shape == flipped.shape == (32, 1, 32, 32)
    assert all(torch.equal(image, plain[0]) for image in plain)
    assert len({image[0, 0, 0].item() for image in cropped}) > 5
    rising = flipped[:, 0, 0, -1] > flipped[:, 0, 0, 0]
    assert 5 < rising.sum() < 27
    mirrored = plain[0].flip(-1)
    for image, up in zip(flipped, rising):
        torch.testing.assert_close(image, plain[0] if up else mirrored, rtol=0, atol=1e-6)


def test_modes_and_sizes_may_be_mixed(tmp_path):
    images = [
        Image.new(mode, size) for mode, size in (("RGB", (9, 20)), ("L", (30, 8)), ("RGBA", (8, 8)), ("P", (50, 40)))
    ]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    arguments = DataArguments(dataset=str(tmp_path), eval_split="train")
    [batch] = evaluation_batches(arguments, processor(num_channels=3), 4)
    assert batch.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path, num_workers):
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    arguments = DataArguments(dataset=str(tmp_path), num_workers=num_workers)
    with pytest.raises(ValueError, match="cannot read image .*broken.png: not an image file"):
        list(islice(training_batches(arguments, processor(), 2), 1))
