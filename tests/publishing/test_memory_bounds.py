"""Files that are small and ask for much memory are refused before the memory is taken."""

import json
import re
import shutil
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub.checks import fails
from optvq_hf import OptVQConfig, OptVQModel
from optvq_hf.commands import convert, evaluate
from optvq_hf.training.models import load_model


class Bytes:
    def __reduce__(self):
        return bytearray, (10**10,)


def deflated(path, content):
    torch.save(content, path)
    with zipfile.ZipFile(path) as source:
        files = {entry.filename: source.read(entry) for entry in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def overlapping(path, content):
    """An archive whose directory names the same bytes many times."""
    torch.save(content, path)
    with zipfile.ZipFile(path, "a") as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist += [entry] * 50
        archive._didModify = True  # pyright: ignore


def expanded(path, content):
    torch.save({**content, "quant_conv.bias": torch.zeros(1).expand(10**11)}, path)


def shared(path, content):
    torch.save({**content, **{f"copy.{number}": content["x"] for number in range(100)}}, path)


def of_bytes(path, content):
    torch.save({"state_dict": content, "more": Bytes()}, path)


def of_bytes_before_archives(path, content):
    torch.save({"state_dict": content, "more": Bytes()}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (deflated, "it is a compressed archive"),
        (overlapping, "the files in this archive are larger than the archive"),
        (expanded, "its tensors, as .*, are larger than the file"),
        (shared, "its tensors, as .*, are larger than the file"),
        (of_bytes, "asks for a bytearray"),
        (of_bytes_before_archives, "asks for a bytearray"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
def test_archives(golden, tmp_path, capsys, write, message, suffix):
    path = tmp_path / f"small.{suffix}"
    write(path, {"x": torch.zeros(100_000)})
    config = golden / "model_plaincnn_mnist" / "config.json"
    line = fails(convert, [path, tmp_path / "out", "--reference-config", config], capsys)
    assert re.search(f"{path.name} is refused: .*{message}", line), line
    assert not (tmp_path / "out").exists()


# ---- configurations that do not fit their weights --------------------------------------------------------------------

HUGE = [
    {"codebook_size": 10**9},
    {"codebook_dim": 4 * 10**8},
    {"num_channels": 10**9},
    {"codebook_size": 10**400},
    {"backbone": "vqgan", "base_channels": 32 * 10**6},
    {"backbone": "vqgan", "num_res_blocks": 10**9},
    {"backbone": "vqgan", "channel_multiplier": [10**7] * 3},
    {"codebook_update": "ema", "use_codebook_projection": False, "codebook_size": 10**9},
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    config = OptVQConfig(image_size=32, backbone="plain_cnn", codebook_size=64, codebook_dim=8)
    OptVQModel(config).save_pretrained(folder)
    from optvq_hf.training.models import make_image_processor

    make_image_processor(config).save_pretrained(folder)
    return folder


def changed(small, tmp_path, entries, **options):
    folder = shutil.copytree(small, tmp_path / "changed")
    if options:
        OptVQModel(OptVQConfig.from_pretrained(small)).save_pretrained(folder, **options)
        (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    sys.set_int_max_str_digits(0)
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    sys.set_int_max_str_digits(4300)
    return folder


@pytest.fixture
def nothing_is_allocated(monkeypatch):
    """Weights are made or read by these; neither may be called."""

    def fail(*_, **__):
        raise AssertionError("weights were about to be allocated")

    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(fail))


@pytest.mark.parametrize("entries", HUGE, ids=lambda entries: "-".join(entries))
def test_a_configuration_is_compared_with_the_headers(small, tmp_path, nothing_is_allocated, capsys, entries):
    folder = changed(small, tmp_path, entries)
    with pytest.raises(ValueError, match="cannot load model"):
        load_model(str(folder))
    line = fails(evaluate, ["--model", folder, "--dataset", "fashion_mnist_sample"], capsys)
    assert "cannot load model" in line and len(line) < 1000
    with pytest.raises(Exception, match="") as refused:
        OptVQModel.from_pretrained(folder)
    assert not isinstance(refused.value, AssertionError)


def test_also_with_shards_and_missing_weights(small, tmp_path, nothing_is_allocated):
    folder = changed(small, tmp_path, {"codebook_size": 10**9}, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    with pytest.raises(ValueError, match=r"quantizer.*\(64,.*in its weights, and would be \(1000000000"):
        load_model(str(folder))
    with pytest.raises(ValueError, match="cannot load model"):  # the new codebook has 32 codes of a huge width
        load_model(str(folder), {"codebook_size": 32, "codebook_dim": 10**9})
    shutil.rmtree(folder)
    folder = changed(small, tmp_path, {"codebook_size": 10**9})
    weights = load_file(folder / "model.safetensors")
    save_file({name: weights[name] for name in weights if "quantizer" not in name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="its weights lack quantizer"):
        load_model(str(folder))


def test_sizes_of_pictures(small, tmp_path):
    folder = changed(small, tmp_path, {})
    for entry in ("size", "crop_size"):
        record = json.loads((small / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(
            json.dumps({**record, entry: {"height": 10**9, "width": 10**9}})
        )
        with pytest.raises(ValueError, match="sizes must be at most 8,192 pixels"):
            load_model(str(folder))
