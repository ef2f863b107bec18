"""Several processes share the batches of an evaluation, and judge unreadable images as one process does."""

import datasets
import pytest
from PIL import Image

from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import evaluation_batches
from optvq_hf.data.loading import UnreadableImageError
from optvq_hf.image_processing_optvq import OptVQImageProcessor


@pytest.fixture(scope="module")
def partly_broken(tmp_path_factory):
    """12 of 120 images cannot be read: in batches of four, all in the share of the first of two processes."""
    images = [
        {"bytes": b"no picture", "path": None} if number in (0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19) else
        Image.new("L", (8, 8), number)
        for number in range(120)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("broken") / "images.parquet"
    datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()})).to_parquet(path)
    return str(path)


def share(dataset, index, count, **settings):
    arguments = DataArguments(dataset=dataset, eval_split="train", image_column="image", **settings)
    return evaluation_batches(
        arguments, OptVQImageProcessor(num_channels=1, size=8, crop_size=8), 4, None, index, count
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("max_unreadable", "fails"), [(0.15, False), (0.05, True)])
def test_two_processes_fail_where_one_does(partly_broken, streaming, max_unreadable, fails):
    """12 images are a fifth of what the first process reads, and a tenth of all."""
    settings = {"streaming": streaming, "max_unreadable": max_unreadable}
    one, two = share(partly_broken, 0, 1, **settings), [share(partly_broken, i, 2, **settings) for i in range(2)]
    assert sum(sum(map(len, batches)) for batches in two) == 108
    counts = [batches.counts for batches in two]
    if fails:
        with pytest.raises(UnreadableImageError, match="images cannot be read, --max-unreadable is 0.05") as of_one:
            list(one)
        for batches in two:
            with pytest.raises(UnreadableImageError) as of_two:
                batches.count_all(counts)
            assert str(of_two.value) == str(of_one.value)
    else:
        two[1].count_all(counts)
        assert sum(map(len, one)) == 108
        assert (two[1].num_images, two[1].num_unreadable) == (one.num_images, one.num_unreadable) == (120, 12)
        assert two[1].report == one.report


def test_batches_keep_their_numbers(partly_broken):
    """Of batches without a readable image, 0, 2 and 4, too."""
    numbers = [[number for number, _ in share(partly_broken, i, 2, max_unreadable=0.15).numbered()] for i in range(2)]
    assert numbers == [list(range(6, 30, 2)), list(range(1, 30, 2))]
