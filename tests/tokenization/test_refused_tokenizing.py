"""`optvq tokenize`: what it refuses, in one line, before it writes anything."""

import datasets
import pytest

from builders import make_untrained, vqgan_config
from folders import shards_of
from optvq_hf.commands import detokenize
from optvq_hf.tokenization import load_tokens
from optvq_hf.training.models import make_image_processor


@pytest.mark.parametrize("kind", ["vqgan", "padding"])
def test_what_the_model_refuses_is_known_before_anything_is_written(tokenize, tmp_path, capsys, fails, kind):
    """The folder can then be used with other settings."""
    model, out = make_untrained(vqgan_config(image_size=16, num_channels=1, attn_resolutions=(8,))), tmp_path / "out"
    processor, flags = make_image_processor(model.config), {"max_images": 4, "columns": None}
    model.save_pretrained(tmp_path / "model")
    if kind == "vqgan":
        processor.save_pretrained(tmp_path / "model")
        wrong, message = (
            {"tile_size": 6},
            "blended: tile_size must be at least 8, 4 times the downsampling factor, got 6",
        )
    else:
        processor.pad_to_multiple_of = 4
        processor.save_pretrained(tmp_path / "model")
        wrong, message = {}, "the image processor pads pictures (pad_to_multiple_of=4), which is for pipelines"
    with pytest.raises(SystemExit):
        tokenize(out, model=tmp_path / "model", **flags, **wrong)
    assert message in fails() and not [path for path in out.rglob("*") if path.is_file()]
    if kind == "padding":
        return
    tokenize(out, model=tmp_path / "model", **flags, tile_size=8)
    pictures = tmp_path / "pictures"
    with pytest.raises(SystemExit):
        detokenize.main(["--tokens", str(out), "--output-dir", str(pictures), "--tile-size", "6"])
    assert message in capsys.readouterr().err and not [path for path in pictures.rglob("*") if path.is_file()]


def test_other_settings_do_not_mix(tokenize, tmp_path, fails):
    tokenize(tmp_path, max_images=20)
    before = shards_of(tmp_path)
    for flags, message in (
        ({"shard_size": 10}, "shard_size 20, not 10"),
        ({"columns": "name"}, 'columns ["label"], not ["name"]'),
        ({"assignment": "sinkhorn"}, 'assignment "nearest", not "sinkhorn"'),
        ({"crops": 1}, "crops 0, not 1"),
        ({"tile_size": 8}, "tile_size that was not recorded, not 8"),
    ):
        with pytest.raises(SystemExit):
            tokenize(tmp_path, **{"max_images": 20, **flags})
        assert message in fails() and shards_of(tmp_path) == before
    tokenize(tmp_path, max_images=20, shard_size=10, overwrite="true")
    assert len(shards_of(tmp_path)) == 2 and len(load_tokens(tmp_path)) == 19


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"columns": "caption"}, "no column 'caption'; its columns are ['image', 'label', 'name']"),
        ({"columns": "caption", "streaming": "true"}, "no column 'caption'"),
        ({"max_unreadable": 0}, "images cannot be read, --max-unreadable is 0; the last: cannot read image 17.png"),
        ({"split": "validation"}, 'Unknown split "validation"'),
        ({"model": "nobody/nothing"}, "cannot load 'nobody/nothing'"),
        ({"tile_size": 2}, "tile_size must be an integer number of pixels, at least the downsampling factor 4, got 2"),
    ],
)
def test_what_cannot_be_done_is_one_line(tokenize, tmp_path, fails, flags, message):
    with pytest.raises(SystemExit) as stop:
        tokenize(tmp_path / "out", **flags)
    assert stop.value.code == 1 and message in fails()
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"columns": "index"}, "columns: 'index' is one that the shards have of their own"),
        ({"columns": "label,label"}, "columns: 'label' is named twice"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"crops": -1}, "crops must be 0 or greater, got -1"),
        ({"engine": "ray", "streaming": "true"}, "--engine ray excludes --streaming"),
        ({"output_dir": None}, "--output-dir is missing"),
        ({"push_to_hub": "name"}, "--push-to-hub must be a Hub id"),
    ],
)
def test_wrong_arguments_are_one_line(tokenize, tmp_path, fails, flags, message):
    with pytest.raises(SystemExit) as stop:
        tokenize(**{"out": tmp_path, **flags})
    assert stop.value.code == 2 and message in fails()


@pytest.mark.parametrize(("streaming", "message"), [("false", "no data"), ("true", "no images to tokenize")])
def test_no_images(tokenize, tmp_path, fails, pictures, streaming, message):
    empty = datasets.load_dataset(str(pictures), split="train").select([])
    empty.to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(SystemExit):
        tokenize(tmp_path / "out", dataset=tmp_path / "empty.parquet", streaming=streaming)
    assert message in fails() and not list((tmp_path / "out").rglob("*.parquet"))


def test_a_folder_that_cannot_be_written(tokenize, tmp_path, fails):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        tokenize(tmp_path / "file" / "out")
    assert "is not a folder" in fails()
