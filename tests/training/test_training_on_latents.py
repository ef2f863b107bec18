"""Training a quantizer on cached latents: as through the encoder, resumed exactly, and with whitened latents."""

import json

import pytest
import torch
from safetensors.torch import load_file

from builders import make_untrained, pixels, plain_config
from optvq_hf import OptVQConfig, OptVQModel
from optvq_hf.commands.train import main
from optvq_hf.training.latents import whiten
from optvq_hf.training.models import load_model, make_image_processor
from training.latents import make_latents


DATA = ["--dataset", "fashion_mnist_sample", "--eval-split", "test[:16]", "--eval-images", "0"]
FROZEN = ["--freeze-encoder", "--freeze-decoder"]
SHORT = ["--batch-size", "8", "--report-to", "none", "--images-every", "0", "--log-every", "1"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_latents(tmp_path_factory.mktemp("source"), 64)


@pytest.fixture
def train(source, tmp_path):
    """train(name, *flags) runs `optvq train` on the model and the images of these latents; returns the output folder."""

    def run(name, *flags, max_steps=6):
        of_model = ["--model", source / "model", "--train-split", "train[:64]", "--max-steps", max_steps]
        main([*DATA, *FROZEN, *SHORT, *map(str, [*of_model, *flags, "--output-dir", tmp_path / name])])
        return tmp_path / name

    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


def log(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


WHITE = ["--whiten-latents", "--codebook-start", "samples", "--codebook-start-batches", "4"]


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_codes_are_those_of_training_through_the_encoder(update, source, train):
    flags = ["--codebook-update", update, *WHITE]
    cached = train("cached", "--latents", source / "latents", *flags)
    through = train("through", *flags)
    start, found, expected = (weights(folder) for folder in (source / "model", cached, through))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    assert not torch.equal(found["quantizer.embedding.weight"], start["quantizer.embedding.weight"])
    for name in start:
        if name.startswith(("encoder.", "decoder.")):
            assert torch.equal(found[name], start[name]), name
    entry = log(cached)[-1]
    assert "psnr" not in entry and entry["codebook_usage"] > 50 and entry["nonfinite_steps"] == 0
    assert entry["codebook_distance"] == pytest.approx(log(through)[-1]["codebook_distance"], rel=1e-3)


def test_a_stopped_run_resumes_exactly(source, train):
    flags = ["--latents", source / "latents", "--codebook-update", "ema", *WHITE, "--save-every", "4"]
    whole = train("whole", *flags)
    resumed = train("whole", *flags, "--resume", "auto")  # finished: nothing to do
    assert resumed == whole
    part = train("part", *flags, "--resume", whole / "checkpoint-4")
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(part).items())


def test_pictures_are_of_the_decoder(source, train):
    from PIL import Image

    folder = train("run", "--latents", source / "latents", "--images-every", "6")
    assert Image.open(folder / "images" / "step-0000006.png").size[0] > 16 * 8


@pytest.mark.parametrize("config", [plain_config(), plain_config(num_codebook_heads=1, codebook_dim=3)])
def test_whitening_changes_latents_and_no_reconstruction(config):
    model = make_untrained(config)
    images = pixels(8, 3, 32, 32)
    with torch.no_grad():
        before = model._decode(model.latents_of(model.encoder_output(images)))
        whiten(model, images.split(2), 4, lambda batch: model.latents_of(model.encoder_output(batch)))
        latents = model.latents_of(model.encoder_output(images))
        after = model._decode(latents)
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, torch.ones_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.quant_conv.weight[0].zero_()
    with pytest.raises(ValueError, match="a channel of the latents is the same at every position"):
        whiten(model, images.split(2), 4, lambda batch: model.latents_of(model.encoder_output(batch)))


def test_levels_and_convolutions_are_added_to_a_loaded_model(tmp_path):
    config = plain_config(use_quant_conv=False, codebook_dim=32, use_codebook_projection=False)
    model = make_untrained(config)
    model.save_pretrained(tmp_path)
    make_image_processor(config).save_pretrained(tmp_path)
    larger, _ = load_model(str(tmp_path), {"use_quant_conv": True, "num_quantizers": 2})
    assert isinstance(larger, OptVQModel) and len(larger.quantizer.levels) == 2
    images = pixels(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(larger.encode(images).latents, model.encode(images).latents)
        latents = torch.randn(2, 32, 8, 8)
        torch.testing.assert_close(larger._decode(latents), model._decode(latents))
    with_convolutions, _ = load_model(str(tmp_path), {"use_quant_conv": True})
    assert torch.equal(with_convolutions.get_codebook(), model.get_codebook())
    with_convolutions.save_pretrained(tmp_path / "with")
    make_image_processor(config).save_pretrained(tmp_path / "with")
    with pytest.raises(ValueError, match="cannot be removed"):
        load_model(str(tmp_path / "with"), {"use_quant_conv": False})


def refused(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main([*DATA, *map(str, argv)])
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    return error.value.code, line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--latents are of the encoder of a model: name it with --model"),
        (["--model", "M"], "it needs --freeze-encoder and --freeze-decoder"),
        (["--model", "M", *FROZEN, "--perceptual-weight", "1"], "--latents excludes --perceptual-weight"),
        (["--model", "M", *FROZEN, "--quantization-start", "2"], "--latents excludes --quantization-start"),
        (["--model", "M", *FROZEN, "--streaming", "--max-steps", "2"], "--latents excludes --streaming"),
        (
            ["--model", "M", *FROZEN, "--random-flip"],
            "--latents excludes --random-flip: `optvq tokenize --latents` has",
        ),
        (["--model", "M", *FROZEN, "--whiten-latents"], "it needs --codebook-start samples or kmeans"),
    ],
)
def test_flags_that_do_not_go_with_latents(flags, message, capsys):
    code, line = refused(["--latents", "L", *flags], capsys)
    assert code == 2 and message in line


def test_models_whose_latents_cannot_be_trained_on(source, tmp_path, capsys):
    missing = ["--model", source / "model", *FROZEN, "--latents", tmp_path / "none", "--output-dir", tmp_path / "out"]
    code, line = refused(missing, capsys)
    assert code == 1 and "has no manifest.json: `optvq tokenize` writes one" in line
    frozen = [*missing[:-4], "--freeze-codebook", "true", "--output-dir", tmp_path / "out"]
    code, line = refused(frozen, capsys)
    assert code == 1 and "nothing is left to train" in line
    for fields, message in (
        ({"use_quant_conv": False, "codebook_dim": 32}, "add them with --use-quant-conv true"),
        ({"normalize_latents": True, "codebook_dim": 4}, "scales latents to length 1"),
    ):
        folder = tmp_path / message[:4]
        config = plain_config(image_size=16, num_channels=1, codebook_size=16, use_codebook_projection=False, **fields)
        OptVQModel(OptVQConfig(**config.to_diff_dict())).save_pretrained(folder)
        make_image_processor(config).save_pretrained(folder)
        code, line = refused(["--model", folder, *FROZEN, *WHITE, "--output-dir", tmp_path / "out"], capsys)
        assert code == 1 and message in line


def test_a_recipe_cannot_remove_the_projection_of_a_codebook(tmp_path, capsys):
    config = plain_config(image_size=16, num_channels=1, codebook_size=16, codebook_dim=4, use_codebook_projection=True)
    make_untrained(config).save_pretrained(tmp_path / "model")
    make_image_processor(config).save_pretrained(tmp_path / "model")
    recipe = ["--config", "transplant_quantizer", "--model", tmp_path / "model", "--output-dir", tmp_path / "out"]
    code, line = refused(recipe, capsys)
    assert code == 1 and "its codebook has a projection, which cannot be removed" in line
    assert not (tmp_path / "out").exists()
