"""`optvq tokenize --latents`: what it writes, and what a run that trains on it refuses."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

from builders import make, noise, plain_config
from optvq_hf import OptVQImageProcessor, OptVQModel
from optvq_hf.commands import detokenize
from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import evaluation_batches
from optvq_hf.data.latents import LatentReader, latent_batches
from optvq_hf.data.order import Item
from optvq_hf.tokenization import load_tokens
from optvq_hf.tokenization.latents import load_latents


@pytest.fixture(scope="module")
def latents(tmp_path_factory, model_folder, pictures):
    """Latents in three shards, and every picture mirrored."""
    from optvq_hf.commands.tokenize import main

    folder = tmp_path_factory.mktemp("latents") / "out"
    flags = ["--model", model_folder, "--dataset", pictures, "--latents", "--flips", "--shard-size", 20]
    main([*map(str, flags), "--output-dir", str(folder)])
    return folder


@pytest.fixture
def model(model_folder):
    return OptVQModel.from_pretrained(model_folder).eval()


@pytest.fixture
def processor(model_folder):
    return OptVQImageProcessor.from_pretrained(model_folder)


def arguments(latents, pictures, **settings):
    return DataArguments(**{"dataset": str(pictures), "latents": str(latents), "eval_split": "train", **settings})


def test_they_are_what_the_encoder_gives_to_the_last_bit(latents, model, processor, pictures):
    rows = load_tokens(latents, latents=True)
    assert rows.column_names == ["index", "latents", "crop", "flipped"] and len(rows) == 2 * 49
    pixel_values = torch.cat(list(evaluation_batches(arguments(latents, pictures), processor, 64)))
    expected = torch.stack([pixel_values, pixel_values.flip(-1)], dim=1).flatten(0, 1)
    with torch.inference_mode():
        expected = model.encoder_output(expected)
        encoded = model.encode(pixel_values, return_loss=False).latents
    found = torch.tensor(np.array(rows.with_format("numpy")["latents"][:]))
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    torch.testing.assert_close(model.latents_of(found[::2]), encoded)


def test_batches_are_rows_of_the_files(latents, model, processor, pictures):
    rows, content = load_latents(arguments(latents, pictures), model, processor)
    whole = np.array(rows.with_format("numpy")["latents"][:])
    batch = LatentReader(rows).__getitems__(([Item(97, ()), Item(0, ()), Item(45, ())], {}))
    assert np.array_equal(batch.pixel_values, whole[[97, 0, 45]])
    batches = latent_batches(rows, content, 8)
    first = next(iter(batches))
    assert first.shape == (8, *whole.shape[1:])
    resumed = latent_batches(rows, content, 8)
    resumed.load_state_dict(batches.state_dict())
    assert not torch.equal(next(iter(resumed)), first)
    with pytest.raises(ValueError, match="the training images are not those that the run has read"):
        latent_batches(rows, "other", 8).load_state_dict(batches.state_dict())


def test_held_out_images_are_not_trained_on(latents, model, processor, pictures):
    settings = arguments(latents, pictures, eval_fraction=0.3)
    rows, content = load_latents(settings, model, processor)
    pixel_values = torch.cat(list(evaluation_batches(settings, processor, 64)))
    assert (
        len(rows) // 2 + len(pixel_values) == 49
        and content != load_latents(arguments(latents, pictures), model, processor)[1]
    )
    with torch.inference_mode():
        unseen = model.encoder_output(pixel_values)
    trained = LatentReader(rows)
    read = trained.__getitems__(([Item(number, ()) for number in range(len(rows))], {})).pixel_values
    assert torch.cdist(unseen.flatten(1), read.flatten(1)).min() > 0.01


def test_refuses_what_another_encoder_or_preprocessing_made(latents, model, processor, pictures):
    other = make(plain_config(image_size=16, num_channels=1, codebook_size=300))
    with torch.no_grad():
        next(other.encoder.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="are of the encoder of .*, and this model has another: make them again"):
        load_latents(arguments(latents, pictures), other, processor)
    with torch.no_grad():
        model.get_codebook().zero_()  # another quantizer is no other encoder
        model.quantizer.embedding.weight.zero_()
    load_latents(arguments(latents, pictures), model, processor)
    larger = OptVQImageProcessor(num_channels=1, size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match="are of images with size.shortest_edge 16, not 18"):
        load_latents(arguments(latents, pictures), model, larger)


def test_they_may_be_computed_in_bfloat16(model, processor, pictures, tmp_path, tokenize):
    folder = tokenize(tmp_path / "out", columns=None, latents="true", dtype="bfloat16", max_images=8)
    rows, _ = load_latents(arguments(folder, pictures), model, processor)
    values = torch.tensor(np.array(rows.with_format("numpy")["latents"][:]))
    assert values.dtype == torch.float32 and torch.equal(values, values.bfloat16().float()) and len(values) == 8


def test_refuses_other_images(latents, model, processor, tmp_path, pictures):
    for number in range(3):
        PIL.Image.fromarray(noise(1, 20, number)[:, :, 0]).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match=f"of other images .* than split 'train' of {tmp_path}"):
        load_latents(arguments(latents, tmp_path), model, processor)
    with pytest.raises(ValueError, match="there is no split 'test'"):
        load_latents(arguments(latents, pictures, train_split="test"), model, processor)


def test_refuses_broken_missing_and_unfinished_folders(latents, model, processor, pictures, tmp_path, tokenize):
    broken = shutil.copytree(latents, tmp_path / "broken")
    shard = sorted((broken / "data").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="train-00001-of-00003.parquet has changed since it was written"):
        load_latents(arguments(broken, pictures), model, processor)
    shard.unlink()
    with pytest.raises(ValueError, match="train-00001-of-00003.parquet is missing"):
        load_latents(arguments(broken, pictures), model, processor)
    (broken / ".progress").mkdir()
    (broken / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizing has not finished"):
        load_latents(arguments(broken, pictures), model, processor)
    with pytest.raises(FileNotFoundError, match="nowhere has no manifest.json"):
        load_latents(arguments(tmp_path / "nowhere", pictures), model, processor)
    codes = tokenize(tmp_path / "codes")
    with pytest.raises(ValueError, match="holds codes, not latents"):
        load_latents(arguments(codes, pictures), model, processor)


def test_a_folder_holds_codes_or_latents(latents, pictures, tmp_path, capsys, tokenize):
    folder = shutil.copytree(latents, tmp_path / "latents")
    with pytest.raises(SystemExit):
        tokenize(folder, columns=None, flips="true")
    assert 'made with latents_of "' in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds latents, not codes"):
        load_tokens(folder)
    with pytest.raises(SystemExit):
        detokenize.main(["--tokens", str(folder), "--output-dir", str(tmp_path / "pictures")])
    assert "holds latents, not codes: make codes by `optvq tokenize` without --latents" in capsys.readouterr().err
    card = (folder / "README.md").read_text()
    assert "# Images as latents" in card and "latents=True" in card and "optvq train --model" in card
    assert json.loads((folder / "manifest.json").read_text())["splits"]["train"]["latents"]["shape"] == [32, 4, 4]
