"""Autoencoders whose networks diffusers makes: converted, loaded again, trained, and refused with one line."""

import json
import sys

import pytest
import torch
from huggingface_hub import ModelCard

from builders import pixels
from optvq_hf import OptVQConfig, OptVQModel
from optvq_hf.commands import train
from optvq_hf.commands.cli import main
from optvq_hf.publishing import reference_files
from optvq_hf.training.models import load_model


TINY = {
    "encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8), "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}  # fmt: skip
DEEP = {
    "in_channels": 3, "latent_channels": 4, "attention_head_dim": 4, "downsample_block_type": "Conv",
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8, 16), "decoder_block_out_channels": (8, 8, 16),
    "encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)), "decoder_qkv_multiscales": ((), (), (5,)),
}  # fmt: skip
KINDS = {"AutoencoderTiny": TINY, "AutoencoderDC": DEEP}


def save(kind, folder):
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**KINDS[kind]).eval()
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return model


def convert(source, out):
    main(["convert", str(source), str(out), "--from", "diffusers", "--codebook-size", "8", "--image-size", "16"])
    return OptVQModel.from_pretrained(out)


def refused(argv, capsys, command=main):
    with pytest.raises(SystemExit) as error:
        command([str(word) for word in argv])
    return error.value.code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_pictures_are_those_of_diffusers(kind, tmp_path):
    theirs = save(kind, tmp_path / "source")
    model = convert(tmp_path / "source", tmp_path / "out")
    images = pixels(2, 3, 16, 24)
    with torch.no_grad():
        encoded = theirs.encode(images)
        latents = encoded.latents if kind == "AutoencoderTiny" else encoded.latent
        torch.testing.assert_close(model.encode(images).latents, latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.decode(quantized=latents).reconstruction, theirs.decode(latents).sample)
    assert model.encode(images).codes.shape == (2, 1, 4, 6) and model.config.downsample_factor == 4
    named = model.config.autoencoder
    assert (named["_class_name"], named["id"], named["revision"]) == (kind, "source", None)
    assert "diffusers, which must be installed" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="tile_size is not for autoencoders of diffusers"):
        model.encode(images, tile_size=8)


def test_the_folder_names_id_and_revision_of_the_hub(tmp_path, monkeypatch):
    save("AutoencoderTiny", tmp_path / "abc123" / "vae")
    monkeypatch.setattr(reference_files, "snapshot_download", lambda *_, **__: str(tmp_path / "abc123"))
    (tmp_path / "abc123" / "README.md").write_text("---\nlicense: mit\n---\n")
    convert("someone/tiny", tmp_path / "out")
    named = json.loads((tmp_path / "out" / "config.json").read_text())["autoencoder"]
    assert (named["id"], named["revision"]) == ("someone/tiny", "abc123")


def test_its_quantizer_trains_with_the_recipe_of_the_first_stage(tmp_path):
    save("AutoencoderTiny", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model")
    data = ["--dataset", "fashion_mnist_sample", "--eval-split", "test[:4]", "--eval-images", "0"]
    short = ["--max-steps", "3", "--batch-size", "4", "--codebook-start-batches", "2", "--report-to", "none"]
    words = ["--config", "transplant_quantizer", "--model", tmp_path / "model", *short, *data, "--save-every", "0"]
    train.main([*map(str, words), "--output-dir", str(tmp_path / "out")])
    trained, _ = load_model(str(tmp_path / "out"))
    assert trained.config.use_quant_conv and trained.config.autoencoder["id"] == "source"
    before = OptVQModel.from_pretrained(tmp_path / "model").state_dict()
    after = trained.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith(("encoder.", "decoder.")))
    assert not torch.equal(after["quantizer.embedding.weight"], before["quantizer.embedding.weight"])


def test_cards_of_runs_in_a_row_name_the_source_and_its_licence(tmp_path, capsys):
    save("AutoencoderTiny", tmp_path / "source")
    license = {"license": "other", "license_name": "for-research", "license_link": "https://example.org/terms"}
    lines = [f"{name}: {text}" for name, text in license.items()]
    (tmp_path / "source" / "README.md").write_text("\n".join(["---", *lines, "---", ""]))
    convert(tmp_path / "source", tmp_path / "model")
    data = [
        "--dataset",
        "fashion_mnist_sample",
        "--eval-split",
        "test[:4]",
        "--eval-images",
        "0",
        "--report-to",
        "none",
    ]
    for before, name in (("model", "first"), ("first", "second")):
        words = ["--model", tmp_path / before, "--max-steps", "1", "--batch-size", "2", "--save-every", "0"]
        train.main([*data, *map(str, words), "--output-dir", str(tmp_path / name)])
        main(["publish", str(tmp_path / name), "me/tiny", "--card-only"])
    card = ModelCard.load(tmp_path / "second" / "README.md")
    assert [card.data[entry] for entry in license] == list(license.values())
    stated = "other, for-research, https://example.org/terms"
    assert (
        f"- Licence of the weights: {stated}\n- Source: training began with `source`, `AutoencoderTiny` of" in card.text
    )
    assert f"its licence: {stated}\n" in card.text and "`torchvision` and `diffusers`." in card.text
    main(["publish", str(tmp_path / "second"), "me/tiny", "--card-only", "--license", "mit"])
    card = ModelCard.load(tmp_path / "second" / "README.md")
    assert card.data.license == "mit" and card.data.license_name is None and f"its licence: {stated}\n" in card.text
    (tmp_path / "model" / "conversion.json").write_text('{"license": 3}')
    words = ["--model", tmp_path / "model", "--output-dir", tmp_path / "third", "--batch-size", "2"]
    code, line = refused([*data, *words], capsys, train.main)
    assert code == 1 and "conversion.json is broken" in line


def test_without_diffusers_there_is_one_line(tmp_path, monkeypatch, capsys):
    save("AutoencoderTiny", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = "is an AutoencoderTiny (source) of diffusers, which is not installed: run pip install diffusers"
    with pytest.raises(ImportError, match=r"AutoencoderTiny \(source\) of diffusers, which is not installed"):
        OptVQModel.from_pretrained(tmp_path / "model")
    source = [tmp_path / "source", tmp_path / "again", "--from", "diffusers", "--codebook-size", "8"]
    code, line = refused(["convert", *source], capsys)
    assert code == 1 and message in line
    words = ["--model", tmp_path / "model", "--dataset", "fashion_mnist_sample", "--output-dir", tmp_path / "out"]
    code, line = refused(words, capsys, train.main)
    assert code == 1 and message in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "diffusers"}, "is for models that `optvq convert --from diffusers` made"),
        ({"autoencoder": {"_class_name": "AutoencoderTiny"}}, 'autoencoder goes with backbone="diffusers"'),
        (
            {"backbone": "diffusers", "autoencoder": {"_class_name": "UNet2DModel"}},
            "of AutoencoderTiny, AutoencoderDC, got",
        ),
        (
            {"backbone": "diffusers", "autoencoder": {"_class_name": "AutoencoderDC", "encoder_block_out_channels": 3}},
            "1 to 16 encoder_block_out_channels, got 3",
        ),
    ],
)
def test_wrong_settings_in_a_configuration(fields, message):
    with pytest.raises(Exception, match=message):
        OptVQConfig(**fields)


def test_broken_sources(tmp_path, capsys):
    save("AutoencoderTiny", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"out_channels": 4}, "images have 3 channels, but reconstructions 4"),
        ({"latent_channels": None}, "latent_channels must be a positive integer"),
        (
            {"unknown": 1},
            "does not make a model: AutoencoderTiny.__init__() got an unexpected keyword argument 'unknown'",
        ),
        ({"latent_channels": 8}, "wrong shape"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        words = ["convert", tmp_path / "source", tmp_path / "out", "--from", "diffusers", "--codebook-size", "8"]
        code, line = refused(words, capsys)
        assert code == 1 and message in line, line
