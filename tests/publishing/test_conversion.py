"""Models of the original, converted: names, shapes, settings, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from fixtures.golden import GOLDEN
from grids import slow
from optvq_hf import OptVQModel
from optvq_hf.commands.cli import main
from optvq_hf.publishing import reference_files
from optvq_hf.publishing.conversion import convert_config, convert_model, convert_name
from optvq_hf.publishing.reference_files import strip_prefixes
from optvq_hf.training.losses.discriminator import PatchDiscriminator
from peak_memory import needs_proc
from reference import original_names


QUANTIZE = {
    "n_e": 64, "e_dim": 32, "beta": 0.25, "use_proj": True, "fix_codes": False, "epsilon": 10, "n_iters": 5,
    "normalize_mode": "all", "use_prob": False, "start_quantize_steps": None, "num_head": 4, "loss_q_type": "l2",
}  # fmt: skip
PLAIN_CNN = {"backbone": "plain_cnn", "encoder": {"in_dim": 1}, "decoder": {"out_dim": 1}, "quantize_type": "optvq"}


def vqgan(**changes):
    part = {
        "double_z": False, "z_channels": 32, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0,
    }  # fmt: skip
    return {"encoder": part, "decoder": dict(part), "quantize": dict(QUANTIZE), "quantize_type": "optvq", **changes}


# ---- round trips -----------------------------------------------------------------------------------------------------

RELOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
import optvq_hf
model, values = AutoModel.from_pretrained(sys.argv[1]), load_file(sys.argv[2])
with torch.inference_mode():
    encoded = model.encode(values["pixel_values"])
    save_file({
        "codes": encoded.codes,
        "from_stored_codes": model.decode(codes=values["indices"]).reconstruction,
        "from_codes": model.decode(codes=encoded.codes).reconstruction,
    }, sys.argv[3])
"""


@pytest.mark.parametrize("name", [model["id"] for model in json.loads((GOLDEN / "models.json").read_text())])
@pytest.mark.parametrize("keep", [False, True])
def test_round_trip_in_a_new_process(golden, tmp_path, capsys, name, keep, new_process):
    """Converted, saved, loaded in a new process: images to codes, and codes alone to the original's reconstructions."""
    source = tmp_path / "source"
    source.mkdir()
    weights = load_file(golden / name / "model.safetensors")
    save_file({f"model.{key}": tensor for key, tensor in weights.items()}, source / "model.safetensors")
    (source / "config.json").write_bytes((golden / name / "config.json").read_bytes())
    out = tmp_path / "converted"
    main(["convert", str(source), str(out), *(["--keep-batch-assignment"] if keep else [])])
    assert (
        f"at inference: {'sinkhorn' if keep and not name.endswith('basevq') else 'nearest'}" in capsys.readouterr().out
    )
    activations = golden / name / "activations.safetensors"
    done = new_process(RELOAD, out, activations, tmp_path / "new.safetensors")
    assert done.returncode == 0, done.stderr
    values, new = load_file(activations), load_file(tmp_path / "new.safetensors")
    torch.testing.assert_close(new["from_stored_codes"], values["decode_code"], rtol=0, atol=1e-4)
    if keep:
        assert (new["codes"] == values["indices"]).float().mean() >= 0.94
        compared = 0
        for codes, pixels, expected, stored in zip(
            new["codes"], new["from_codes"], values["indices"], values["reconstruction"]
        ):
            if torch.equal(codes, expected):
                torch.testing.assert_close(pixels, stored, rtol=0, atol=1e-4)
                compared += 1
        assert compared or not name.endswith("basevq")
    else:
        assert torch.equal(new["codes"], values["indices_nearest"])
        torch.testing.assert_close(new["from_codes"], values["reconstruction_nearest"], rtol=0, atol=1e-4)


def test_a_published_folder(folder, tmp_path, capsys):
    for number in range(3):
        Image.effect_noise((40, 40), 80 + number).save(folder / f"{number}.png")
    out = tmp_path / "deep" / "converted"
    flags = ["--with-discriminator", "--check-images", str(folder), str(folder / "0.png")]
    main(["convert", str(folder), str(out), *flags])
    shown = capsys.readouterr().out
    [(differing, total)] = re.findall(
        r"([\d,]+) of ([\d,]+) codes .* differ between sinkhorn on the batch of 4 images", shown
    )
    assert int(total.replace(",", "")) == 4 * 4 * 16 * 16 and 0 < int(differing.replace(",", "")) < 4 * 4 * 16 * 16
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} < files
    assert {"discriminator/config.json", "discriminator/model.safetensors"} < files
    assert [path.name for path in out.parent.iterdir()] == ["converted"]

    weights = load_file(folder / "model.safetensors")
    discriminator = PatchDiscriminator.from_pretrained(out / "discriminator").state_dict()
    assert all(
        torch.equal(weights[f"model.loss.discriminator.{name}"], tensor) for name, tensor in discriminator.items()
    )

    card = ModelCard.load(out / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "transformers" and card.data.base_model is None
    for text in (
        "`published`",
        "| sinkhorn_epsilon | `10` |",
        "`nearest`: every feature gets its nearest code",
        "in the folder `discriminator`",
    ):
        assert text in card.text, text


def test_the_snippet_of_the_card_runs(folder, tmp_path, new_process):
    out = tmp_path / "converted"
    main(["convert", "--with-discriminator", str(folder), str(out)])  # a switch before the source
    [snippet] = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    Image.effect_noise((50, 40), 80).save(out / "picture.png")
    done = new_process(snippet, cwd=out)
    assert done.returncode == 0, done.stderr
    assert Image.open(out / "reconstruction.png").size == (32, 32)


def test_an_empty_folder_may_be_there(folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    main(["convert", str(folder), "."])
    assert OptVQModel.from_pretrained(tmp_path / "empty").config.codebook_size == 64
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_hub_id(folder, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(reference_files, "snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    main(["convert", "BorelTHU/optvq-16x16x4", str(tmp_path / "out"), "--keep-batch-assignment"])
    assert {*asked} == {"BorelTHU/optvq-16x16x4"}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "BorelTHU/optvq-16x16x4"
    assert "depend on the\nother images of its batch" in card.text and f"revision `{folder.name}`" in card.text
    assert "without the perceptual network and the discriminator" in card.text


def test_published_with_the_authors_figures(folder, tmp_path, monkeypatch, hub):
    """Beside those that were measured on the converted weights, once there are some."""
    with monkeypatch.context() as patch:
        patch.setattr(reference_files, "snapshot_download", lambda *_, **__: str(folder))
        main(["convert", "BorelTHU/optvq-16x16x4", str(tmp_path / "out"), "--with-discriminator"])
    monkeypatch.setenv("HF_TOKEN", hub.add_user("alice"))
    main(["publish", str(tmp_path / "out"), "alice/converted"])
    files = hub.repository("alice/converted").files()
    reported = yaml.safe_load(files[".eval_results/reported.yaml"])
    assert {entry["dataset"]["task_id"]: entry["value"] for entry in reported}["reconstruction_rfid"] == 1.0
    assert all(entry["source"]["name"] == "reported by the authors" for entry in reported)
    assert "discriminator/model.safetensors" in files and ".eval_results/optvq.yaml" not in files

    measure = ["--dataset", "fashion_mnist_sample", "--max-images", "16"]
    main(["evaluate", "--model", str(tmp_path / "out"), *measure])
    main(["publish", str(tmp_path / "out"), "alice/converted"])
    card = ModelCard(hub.repository("alice/converted").files()["README.md"].decode())
    sources = [result.source_name for result in card.data.eval_results]
    assert sources.count("reported by the authors") == 4 and sources.count(None) == 5
    assert "16 images, split `test` of `fashion_mnist_sample`" in card.text and "| 0.717 | 26.59 |" in card.text


@pytest.mark.parametrize("entry", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", slow("_orig_mod."), slow("_orig_mod.module."), "module._orig_mod."])
def test_training_checkpoints(golden, tmp_path, entry, prefix):
    weights = load_file(golden / "model_plaincnn_mnist" / "model.safetensors")
    content = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save(content if entry is None else {entry: content, "epoch": 3, "optimizer": {"state": {}}}, path)
    reference = json.loads((golden / "model_plaincnn_mnist" / "config.json").read_text())
    backbone = "optvq.models.backbone.simple_cnn.PlainCNN"
    params = {
        "use_connector": True,
        "encoder": {"target": f"{backbone}Encoder", "params": {"in_dim": 1}},
        "decoder": {"target": f"{backbone}Decoder", "params": {"out_dim": 1}},
        "quantize": {"target": "optvq.models.quantizer.VectorQuantizerSinkhorn", "params": reference["quantize"]},
        "loss": {"target": "optvq.losses.aeloss.AELoss", "params": {}},
    }
    config = tmp_path / "mnist.yaml"
    config.write_text(
        yaml.safe_dump({"mode": "train", "model": {"autoencoder": {"target": "VQModel", "params": params}}})
    )
    out = tmp_path / "out"
    main(["convert", str(path), str(out), "--reference-config", str(config)])
    model = OptVQModel.from_pretrained(out)
    expected = convert_model(convert_config(reference), weights)
    assert model.config.to_dict() == {**expected.config.to_dict(), "architectures": ["OptVQModel"], **{
        key: model.config.to_dict()[key] for key in ("dtype", "_name_or_path", "auto_map") if key in model.config.to_dict()
    }}  # fmt: skip
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# ---- structures ------------------------------------------------------------------------------------------------------

CONVERT = """
import sys, torch
from optvq_hf.commands.cli import main
from peak_memory import peak_memory
main(["convert", *sys.argv[1:]])
print("peak", peak_memory())
"""


@pytest.mark.parametrize("heads", [4, 8])
def test_full_size_names(golden, heads):
    """Every stored key has its place and its shape."""
    structure = json.loads((golden / f"structure_imagenet_f16_h{heads}.json").read_text())
    config = convert_config(structure["config"])
    with torch.device("meta"):
        state = OptVQModel(config).state_dict()
    averages = {f"quantizer.{name}" for name in ("potentials", "cost_scale", "num_updates", "last_potentials")}
    shapes = {name: list(tensor.shape) for name, tensor in state.items() if name not in averages}
    stored = {convert_name(name, config): entry["shape"] for name, entry in structure["state_dict"].items()}
    assert len(stored) == 345 and stored == shapes


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 8])
def test_full_size_structures(golden, tmp_path, heads):
    """Every stored key, shape and dtype has its place, and nothing else does; with the 60 keys of the objective in it."""
    structure = json.loads((golden / f"structure_imagenet_f16_h{heads}.json").read_text())
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    names = {**structure["state_dict"], **structure["loss_state_dict"]}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for number, (name, entry) in enumerate(names.items()):
        dtype = getattr(torch, entry["dtype"])
        tensor = (
            torch.rand(entry["shape"], generator=generator) + number if dtype.is_floating_point else torch.zeros(())
        )
        weights[f"model.{name}"] = tensor.to(dtype)
    save_file(weights, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(structure["config"]))

    done = subprocess.run(
        [sys.executable, "-c", CONVERT, source, out, "--with-discriminator"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout.split("peak ")[1]) < 3e9
    config = convert_config(structure["config"])
    assert config.downsample_factor == structure["downsample_factor"]
    assert [config.num_codebook_heads, config.latent_size, config.latent_size] == structure["indices_shape_per_image"]
    converted = load_file(out / "model.safetensors")
    averages = {name for name in converted if name.startswith("quantizer.") and name.count(".") == 1}
    assert averages == {f"quantizer.{name}" for name in ("potentials", "cost_scale", "num_updates", "last_potentials")}
    wanted = {convert_name(name, config): name for name in structure["state_dict"]}
    assert len(wanted) == len(structure["state_dict"]) == 345 and set(wanted) == set(converted) - averages
    for ours, theirs in wanted.items():
        entry = structure["state_dict"][theirs]
        assert list(converted[ours].shape) == entry["shape"] and str(converted[ours].dtype) == f"torch.{entry['dtype']}"
        assert torch.equal(converted[ours], weights[f"model.{theirs}"]), theirs
    with torch.device("meta"):
        model = OptVQModel(config)
    counts = structure["param_counts"]
    assert model.num_parameters() == counts["total"]
    for part, count in (("encoder", "encoder"), ("decoder", "decoder"), ("quantizer", "quantize")):
        assert sum(p.numel() for p in getattr(model, part).parameters()) == counts[count]


@pytest.mark.parametrize("heads", [1, slow(4), 8])
@pytest.mark.parametrize("connector", [True, False])
@pytest.mark.parametrize("quantize_type", ["optvq", slow("basevq")])
@pytest.mark.parametrize("backbone", ["plain_cnn", "f2", "f32"])
def test_every_kind_of_model(heads, connector, quantize_type, backbone, tmp_path):
    """Both backbones and quantizers, with and without connectors; f 32 as the original has it, narrower."""
    quantize = {**QUANTIZE, "num_head": heads, "fix_codes": heads == 1, "use_proj": heads != 8}
    if backbone == "plain_cnn":
        reference = {**PLAIN_CNN, "quantize": quantize}
    else:
        reference = vqgan(quantize=quantize)
        if backbone == "f32":
            for part in ("encoder", "decoder"):
                reference[part] |= {"resolution": 64, "ch_mult": [1, 1, 2, 2, 4, 4], "attn_resolutions": [2]}
    reference |= {"quantize_type": quantize_type, "use_connector": connector}
    config = convert_config(reference)
    torch.manual_seed(0)
    ours = OptVQModel(config)
    names = original_names(ours, config)
    weights = {names[name]: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    model = convert_model(config, weights)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(ours.named_parameters())[name])
    assert all(p.requires_grad == (heads != 1) for p in model.quantizer.parameters())
    assert hasattr(model.quant_conv, "weight") == connector
    size = config.image_size
    pixel_values = torch.rand(1, config.num_channels, size, size) * 2 - 1
    codes = model.encode(pixel_values).codes
    assert codes.shape == (1, heads, config.latent_size, config.latent_size)
    assert model.decode(codes=codes).reconstruction.shape == pixel_values.shape
    model.save_pretrained(tmp_path)
    assert torch.equal(OptVQModel.from_pretrained(tmp_path).encode(pixel_values).codes, codes)


def test_settings():
    quantize = {
        **QUANTIZE,
        "epsilon": 3.0,
        "n_iters": 7,
        "normalize_mode": "dim",
        "loss_q_type": "l1",
        "beta": 0.5,
        "use_prob": True,
    }
    config = convert_config(vqgan(quantize=quantize))
    found = {name: getattr(config, name) for name in (
        "sinkhorn_epsilon", "sinkhorn_iterations", "cost_normalization", "codebook_loss_type", "codebook_loss_weight",
        "training_assignment", "inference_assignment", "attn_resolutions", "base_channels", "latent_channels",
    )}  # fmt: skip
    assert found == {
        "sinkhorn_epsilon": 3.0, "sinkhorn_iterations": 7, "cost_normalization": "sqrt_dim", "codebook_loss_type": "l1",
        "codebook_loss_weight": 0.5, "training_assignment": "sample", "inference_assignment": "nearest",
        "attn_resolutions": [16], "base_channels": 32, "latent_channels": 32,
    }  # fmt: skip
    assert convert_config(vqgan(quantize={**QUANTIZE, "normalize_mode": None})).cost_normalization == "none"
    # Where the configuration is silent, the original's classes decide.
    silent = convert_config({**PLAIN_CNN, "quantize": {"n_e": 64, "e_dim": 8}, "quantize_type": "basevq"})
    assert silent.codebook_loss_type == "cross_entropy" and silent.training_assignment == "nearest"
    assert silent.codebook_loss_weight == 1.0 and silent.num_codebook_heads == 1
    assert convert_config({**PLAIN_CNN, "quantize": {"n_e": 64, "e_dim": 8}}).training_assignment == "sample"


def test_prefixes_are_stripped_only_where_all_have_them():
    tensor = torch.zeros(1)
    assert set(strip_prefixes({"module.model.a": tensor, "module.model.b": tensor})) == {"a", "b"}
    assert set(strip_prefixes({"model.a": tensor, "b": tensor})) == {"model.a", "b"}
