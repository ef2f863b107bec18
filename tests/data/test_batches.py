import io
import json
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from grids import slow
from optvq_hf import OptVQImageProcessor
from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import ImageCollator, evaluation_batches, training_batches
from optvq_hf.data.loading import UnreadableImageError
from optvq_hf.data.order import some_rows


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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_evaluation_batches_hold_every_image_in_order(numbered, streaming, num_workers):
    arguments = DataArguments(dataset=numbered, eval_split="train", streaming=streaming, num_workers=num_workers)
    batches = evaluation_batches(arguments, processor(), 16)
    for _ in range(2):
        seen = numbers(batches)
        assert [len(batch) for batch in seen] == [16, 16, 8] and sum(seen, []) == list(range(40))
    before = []
    for max_images in (5, 16, 17, 1000):  # a sample, of a stream the first, however many workers share the shards
        taken = sum(numbers(evaluation_batches(arguments, processor(), 16, max_images)), [])
        expected = range(min(max_images, 40)) if streaming else some_rows(40, max_images)
        assert taken == list(expected) and set(before) < set(taken)
        before = taken


def test_a_sample_is_of_all_classes():
    """The first images of a sorted dataset would be of its first classes; the score of checkpoints must be of all."""
    for number in (50, 500):
        rows = some_rows(10_000, number)
        assert rows == sorted(set(rows)) == some_rows(10_000, number) and len(rows) == number
        per_class = np.bincount(np.array(rows) // 1000, minlength=10)
        assert per_class.min() > 0 and per_class.max() <= 0.3 * number


def test_the_number_of_evaluation_batches_is_known(numbered):
    arguments = DataArguments(dataset=numbered, eval_split="train")
    for max_images in (None, 1, 16, 17, 1000):
        batches = evaluation_batches(arguments, processor(), 16, max_images)
        assert len(batches) == len(list(batches))
    with pytest.raises(TypeError):
        len(evaluation_batches(DataArguments(dataset=numbered, eval_split="train", streaming=True), processor(), 16))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_skips_and_counts_images_that_cannot_be_read(tmp_path, streaming, num_workers):
    for number in range(5):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    settings = {"dataset": str(tmp_path), "eval_split": "train", "streaming": streaming, "num_workers": num_workers}
    batches = evaluation_batches(DataArguments(**settings), processor(), 2)
    for _ in range(2):  # the counts are those of one iteration
        assert numbers(batches) == [[0, 1], [2], [4]]
        assert (batches.num_images, batches.num_unreadable) == (5, 1)
        assert batches.report.startswith("unreadable 1 of 5 images, the last: cannot read image ")
        assert batches.report.endswith("3.png: not an image file")
    some = [[0, 1], [2]] if streaming else [[0, 1], [4]]
    assert numbers(evaluation_batches(DataArguments(**settings), processor(), 2, max_images=4)) == some
    strict = evaluation_batches(DataArguments(**settings, max_unreadable=0), processor(), 2)
    with pytest.raises(
        UnreadableImageError, match=r"1 of 4 images cannot be read, .* is 0; the last: .*3\.png: not an image"
    ):
        list(strict)


def test_too_few_images_for_a_batch(numbered, tmp_path):
    with pytest.raises(ValueError, match="split 'train' of dataset .* has 40 images, fewer than one batch of 41"):
        next(iter(training_batches(DataArguments(dataset=numbered), processor(), 41)))
    one_of_41 = training_batches(DataArguments(dataset=numbered, streaming=True), processor(), 1, 0, 40, 41)
    with pytest.raises(ValueError, match="stream has no image for process 40 of 41"):
        next(iter(one_of_41))


def test_a_batch_of_a_stream_may_be_longer_than_an_epoch(numbered):
    batches = numbers(islice(training_batches(DataArguments(dataset=numbered, streaming=True), processor(), 60), 2))
    assert sorted(sum(batches, [])) == sorted([*range(40)] * 3)


def test_a_place_belongs_to_an_order(numbered):
    for first, changed in (
        ({"streaming": True}, {"streaming": True, "shuffle_buffer": 8}),
        ({"streaming": True}, {}),
        ({}, {"train_split": "train[:30]"}),
    ):
        batches, others = (
            training_batches(DataArguments(dataset=numbered, **flags), processor(), 5) for flags in (first, changed)
        )
        next(iter(batches))
        with pytest.raises(ValueError, match="cannot resume at this position in the data"):
            others.load_state_dict(batches.state_dict())


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
    arguments = DataArguments(dataset=str(tmp_path), num_workers=num_workers, max_unreadable=0)
    with pytest.raises(ValueError, match="cannot read image .*broken.png: not an image file"):
        list(islice(training_batches(arguments, processor(), 2), 1))


# ---- a place in the order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, slow(2)])
@pytest.mark.parametrize(
    "streaming", [{}, {"streaming": True, "shuffle_buffer": 7}, slow({"streaming": True, "shuffle_buffer": 1000})]
)
def test_going_on_from_any_batch(numbered, streaming, num_workers):
    """Also from the ends of blocks, shards and epochs, and in the middle of them; the workers' reading ahead is not lost."""
    arguments = DataArguments(dataset=numbered, num_workers=num_workers, **streaming)

    def make():
        return training_batches(arguments, processor(), 6, seed=3)

    whole, states = make(), []
    expected = []
    for batch in islice(whole, 17):
        expected += numbers([batch])
        states.append(json.loads(json.dumps(whole.state_dict())))
    for consumed in range(0, 16, 1 if num_workers == 0 else 5):
        resumed = make()
        resumed.load_state_dict(states[consumed])
        assert numbers(islice(resumed, 16 - consumed)) == expected[consumed + 1 :]
        assert resumed.num_images == 17 * 6


@pytest.mark.parametrize("num_processes", [2, 3])
def test_every_process_goes_on_in_its_own_share(numbered, num_processes):
    """With 4 shards, 2 processes have shards of their own and 3 take turns in all of them."""
    arguments = DataArguments(dataset=numbered, streaming=True, shuffle_buffer=8)
    for rank in range(num_processes):
        first, resumed = (training_batches(arguments, processor(), 2, 0, rank, num_processes) for _ in range(2))
        seen = numbers(islice(first, 5))
        resumed.load_state_dict(first.state_dict())
        whole = numbers(islice(training_batches(arguments, processor(), 2, 0, rank, num_processes), 25))
        assert seen + numbers(islice(resumed, 20)) == whole


def test_a_place_in_a_stream_belongs_to_a_number_of_processes(numbered):
    arguments = DataArguments(dataset=numbered, streaming=True)
    alone = training_batches(arguments, processor(), 2)
    next(iter(alone))
    one_of_two = training_batches(arguments, processor(), 2, 0, 0, 2)
    with pytest.raises(ValueError, match="it is for processes=1, but the run has processes=2"):
        one_of_two.load_state_dict(alone.state_dict())


def test_together_the_processes_read_the_batch_of_one(numbered):
    """So that training does not depend on how a batch is shared out; also if the number of processes changes on the way."""
    alone = numbers(islice(training_batches(DataArguments(dataset=numbered), processor(), 8, seed=1), 12))
    state = None
    for num_processes, first, last in ((1, 0, 3), (2, 3, 7), (4, 7, 12)):
        shares = []
        for rank in range(num_processes):
            batches = training_batches(
                DataArguments(dataset=numbered), processor(), 8 // num_processes, 1, rank, num_processes
            )
            if state:
                batches.load_state_dict(state)
            shares.append(numbers(islice(batches, last - first)))
        state = batches.state_dict()
        together = [sorted(sum(parts, [])) for parts in zip(*shares)]
        assert together == [sorted(batch) for batch in alone[first:last]]


@pytest.mark.parametrize("streaming", [False, True])
def test_augmentation_does_not_depend_on_workers_or_the_training_generator(streaming):
    flags = {"random_crop": True, "random_flip": True, "streaming": streaming}
    batches = []
    for num_workers in (0, 2):
        torch.manual_seed(num_workers)
        before = torch.get_rng_state()
        of_workers = training_batches(
            DataArguments("fashion_mnist_sample", num_workers=num_workers, **flags), processor(24, 3), 8
        )
        batches.append(torch.stack(list(islice(of_workers, 3))))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*batches)


# ---- images that are odd or broken -----------------------------------------------------------------------------------


def png(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_odd_images_are_converted(tmp_path):
    deep = Image.fromarray((np.arange(400, dtype=np.uint16) * 150).reshape(20, 20))
    rows = [
        png(Image.new("CMYK", (12, 9), (10, 20, 30, 40)), "JPEG"),
        png(Image.new("P", (9, 12))),
        png(Image.new("RGBA", (10, 10), (255, 0, 0, 128))),
        png(Image.new("LA", (10, 10))),
        png(Image.new("1", (10, 10))),
        png(deep),
        png(Image.new("RGB", (1, 1), (0, 255, 0))),
        png(Image.new("L", (300, 8))),
    ]
    datasets.Dataset.from_dict({"image": rows}).to_parquet(tmp_path / "train.parquet")
    for num_channels in (1, 3):
        arguments = DataArguments(dataset=str(tmp_path / "train.parquet"), image_column="image", max_unreadable=0)
        batch = next(iter(training_batches(arguments, processor(num_channels=num_channels), 8)))
        assert batch.shape == (8, num_channels, 8, 8) and batch.abs().max() <= 1 and batch.isfinite().all()


@pytest.fixture
def five_percent_corrupt(tmp_path) -> str:
    """200 images in 4 shards; every 20th is cut off, not an image, empty or missing."""
    whole = png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)))
    broken = [whole[:-60], b"no picture", b"", None]
    for shard in range(4):
        rows = [broken[n // 20 % 4] if n % 20 == 7 else whole for n in range(shard * 50, shard * 50 + 50)]
        table = datasets.Dataset.from_dict({"image": rows}, datasets.Features({"image": datasets.Value("binary")}))
        table.to_parquet(tmp_path / f"train-{shard}.parquet")
    return str(tmp_path / "train-*.parquet")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_broken_images_are_replaced_and_counted(five_percent_corrupt, streaming, num_workers):
    arguments = DataArguments(
        dataset=five_percent_corrupt, image_column="image", streaming=streaming, num_workers=num_workers
    )
    batches = training_batches(arguments, processor(), 10)
    assert all(batch.shape == (10, 1, 8, 8) for batch in islice(batches, 20))
    assert batches.num_images == 200 and batches.num_unreadable == 10
    assert batches.last_unreadable.startswith("cannot read ")
    resumed = training_batches(arguments, processor(), 10)
    resumed.load_state_dict(batches.state_dict())
    list(islice(resumed, 20))
    assert resumed.num_unreadable == 20


@pytest.mark.parametrize("streaming", [False, True])
def test_too_many_broken_images_end_the_run(five_percent_corrupt, tmp_path, streaming):
    strict = DataArguments(dataset=five_percent_corrupt, image_column="image", streaming=streaming, max_unreadable=0.02)
    with pytest.raises(UnreadableImageError, match=r"^3 of \d+ images cannot be read, --max-unreadable is 0.02"):
        list(islice(training_batches(strict, processor(), 10), 20))
    nothing = datasets.Dataset.from_dict({"image": [b"no picture"] * 50})
    nothing.to_parquet(tmp_path / "nothing.parquet")
    arguments = DataArguments(
        dataset=str(tmp_path / "nothing.parquet"), image_column="image", streaming=streaming, max_unreadable=1.0
    )
    with pytest.raises(UnreadableImageError, match="100 of 100 images cannot be read"):
        next(iter(training_batches(arguments, processor(), 10)))


def test_modes_without_interpolation_are_converted_before_a_random_crop():
    checkers = Image.fromarray((np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)).convert("1")
    records = [{"image": {"bytes": png(checkers), "path": None}}]
    assert ImageCollator(processor(16), random_crop=True)(records).abs().max() < 0.9  # grey, not black and white


def test_a_random_crop_is_a_part_of_the_picture_as_it_is_resized_without_one():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    records = [{"image": {"bytes": png(image), "path": None}}] * 8
    sizes = {"size": {"height": 24, "width": 30}, "num_channels": 3}
    whole = OptVQImageProcessor(**sizes, do_center_crop=False)(image, return_tensors="pt")["pixel_values"][0]
    windows = whole.unfold(1, 16, 1).unfold(2, 16, 1).movedim(0, 2).reshape(-1, 3, 16, 16)
    crops = ImageCollator(OptVQImageProcessor(**sizes, crop_size={"height": 16, "width": 16}), random_crop=True)(
        records
    )
    assert all((windows == crop).flatten(1).all(1).any() for crop in crops)


def test_a_random_crop_of_a_smaller_picture():
    records = [{"image": {"bytes": png(Image.new("L", (12, 12))), "path": None}}]
    collator = ImageCollator(OptVQImageProcessor(size=8, crop_size=16, num_channels=1), random_crop=True)
    with pytest.raises(ValueError, match="a picture of 8 x 8 pixels is smaller than the crop of 16 x 16"):
        collator(records)


def test_broken_images_at_the_beginning_are_a_share_of_the_whole(tmp_path):
    """11 of the first 64 of 1,000 are 1.1 %; of 64 images in all they are too many, and so are 101 of 1,000."""
    broken = {"bytes": b"no picture", "path": None}
    images = [broken] * 11 + [Image.new("L", (8, 8), number % 256) for number in range(989)]
    features = datasets.Features({"image": datasets.Image()})
    many = [broken] * 101 + images[101:]
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "few.parquet")
    datasets.Dataset.from_dict({"image": many}, features=features).to_parquet(tmp_path / "many.parquet")
    datasets.Dataset.from_dict({"image": images[:64]}, features=features).to_parquet(tmp_path / "short.parquet")
    few, many, short = (
        DataArguments(dataset=str(tmp_path / f"{name}.parquet"), eval_split="train", image_column="image")
        for name in ("few", "many", "short")
    )
    assert sum(map(len, evaluation_batches(few, processor(), 8))) == 989
    with pytest.raises(UnreadableImageError, match="^11 of 16 images cannot be read"):
        list(evaluation_batches(short, processor(), 8))
    with pytest.raises(UnreadableImageError, match="^101 of 104 images cannot be read"):
        list(evaluation_batches(many, processor(), 8))
