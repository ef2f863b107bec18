"""Broken and hostile models end in one clear line, with nothing written."""

import argparse
import json
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from optvq_hf import OptVQModel
from optvq_hf.commands.cli import main
from optvq_hf.training.losses.discriminator import PatchDiscriminator
from publishing.conversions import Command, fails


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def deep_config(folder):
    (folder / "config.json").write_text("[" * 100_000)


def list_config(folder):
    (folder / "config.json").write_text("[]")


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def part(name, **changes):
    def change(folder):
        change_config(folder, lambda config: config[name].update(changes))

    return change


def whole(**changes):
    def change(folder):
        change_config(folder, lambda config: config.update(changes))

    return change


def drop(name, of):
    def change(folder):
        change_config(folder, lambda config: (config[of] if of else config).pop(name))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_config, "cannot read the configuration .*config.json: No such file"),
        (broken_config, "the configuration .*config.json is broken"),
        (list_config, "it must hold entries, got list"),
        (no_weights, "has no weights: neither model.safetensors nor pytorch_model.bin"),
        (cut_weights, "the weights .* are broken or cut short"),
        (whole(quantize_type="lfq"), "unknown quantizer 'lfq' in the configuration; known are optvq, basevq"),
        (part("quantize", normalize_mode="softmax"), "unknown normalize_mode 'softmax'.* known are all, dim, null"),
        (part("quantize", loss_q_type="huber"), "unknown loss_q_type 'huber'"),
        (part("quantize", rotation=True), "unknown quantizer setting 'rotation'"),
        (part("quantize", use_norm=True), "use_norm"),
        (part("quantize", num_head=5), "codebook_dim must be divisible by num_codebook_heads, got 32 and 5"),
        (part("quantize", n_e=65), "wrong shape: quantize.embedding.weight is .64, 8., not .65, 8."),
        (part("quantize", use_proj=False), "not known: quantize.proj.bias; not known: quantize.proj.weight"),
        (part("encoder", double_z=True), "the encoder has double_z: True; only False is supported"),
        (part("decoder", give_pre_end=True), "the decoder has give_pre_end: True"),
        (part("decoder", attention="linear"), "unknown decoder setting 'attention'"),
        (part("encoder", dropout=0.5), "encoder and decoder differ in dropout: 0.5 and 0.0"),
        (part("quantize", use_prob="false"), "use_prob must be true or false in the configuration, got 'false'"),
        (part("quantize", n_e="many"), "the configuration does not make a model: .*'?codebook_size"),
        (part("quantize", n_e=10**30), "the configuration does not make a model: "),
        (part("quantize", normalize_mode=["all"]), "unknown normalize_mode .'all'."),
        (part("encoder", ch_mult=[1] * 3000), "encoder and decoder differ in ch_mult"),
        (part("encoder", num_res_blocks=10**9), "encoder and decoder differ in num_res_blocks"),
        (lambda f: [part(name, num_res_blocks=10**9)(f) for name in ("encoder", "decoder")], "at most 1000 residual"),
        (lambda f: [part(name, ch_mult=[1] * 300)(f) for name in ("encoder", "decoder")], "got 300"),
        (whole(use_connector=None), "use_connector must be true or false in the configuration, got None"),
        (whole(backbone="vit"), "unknown backbone 'vit' in the configuration; known are vqgan, diffusion, plain_cnn"),
        (whole(encoder=[1]), "has list instead of a mapping as its entry 'encoder'"),
        (whole(model="x"), "has str instead of a mapping as its entry 'model'"),
        (whole(model={"autoencoder": {"params": None}}), "has no entry 'model'"),
        (deep_config, "the configuration .*config.json is broken"),
        (
            lambda f: change_weights(f, lambda w: w.update({"model.quantizer.embedding.weight": torch.zeros(64, 8)})),
            "the weights hold one tensor twice, as .*quantize",
        ),
        (
            lambda f: change_weights(f, lambda w: w["model.quant_conv.bias"].fill_(float("nan"))),
            "NaN or inf: quant_conv.bias",
        ),
        (
            lambda f: change_weights(f, lambda w: w.update({"model.quant_conv.bias": torch.zeros(32).half()})),
            "several dtypes: torch.float16, torch.float32",
        ),
        (part("decoder", ch=64), "encoder and decoder differ in ch: 32 and 64"),
        (part("decoder", out_ch=1), "encoder and decoder differ in out_ch: 3 and 1"),
        (drop("ch_mult", "encoder"), "the configuration of the encoder lacks 'ch_mult'"),
        (drop("quantize", None), "the configuration has no entry 'quantize'"),
        (whole(use_connector=False), "not known: post_quant_conv.bias"),
        (lambda f: change_weights(f, lambda w: w.pop("model.encoder.conv_in.weight")), "missing: encoder.conv_in.weight"),
        (
            lambda f: change_weights(f, lambda w: w.update({"model.quant_conv.bias": torch.zeros(32, dtype=torch.int64)})),
            "wrong dtype: quant_conv.bias is torch.int64",
        ),
        (lambda f: change_weights(f, lambda w: [w.pop(n) for n in list(w) if ".mid." in n]), "missing: .*; and 46 more"),
    ],
)  # fmt: skip
def test_broken_folders(folder, tmp_path, capsys, change, message):
    change(folder)
    fails(capsys, tmp_path, [folder, tmp_path / "out"], message)


def test_a_full_disk_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(OptVQModel, "save_pretrained", full)
    fails(capsys, tmp_path, [folder, tmp_path / "deep" / "out"], "No space left on device")


def test_a_discriminator_of_another_kind(folder, tmp_path, capsys):
    huge = torch.zeros(1).expand(10**6, 3, 4, 4)
    with pytest.raises(ValueError, match="not those of a patch discriminator"):
        PatchDiscriminator.from_weights({"main.0.weight": huge, "main.2.weight": huge, "main.3.weight": huge})
    change_weights(folder, lambda w: w.update({"model.loss.discriminator.main.2.weight": torch.zeros(1, 1, 4, 4)}))
    fails(capsys, tmp_path, [folder, tmp_path / "out", "--with-discriminator"], "not those of a patch discriminator")


def test_broken_checkpoints(golden, tmp_path, capsys):
    config = golden / "model_plaincnn_mnist" / "config.json"
    weights = load_file(golden / "model_plaincnn_mnist" / "model.safetensors")
    path, out, mark = tmp_path / "checkpoint.pth", tmp_path / "out", tmp_path / "mark"
    flags = ["--reference-config", config]

    torch.save({"model": weights}, path)
    fails(
        capsys,
        tmp_path,
        [path, out],
        "does not contain its configuration: name its YAML or JSON file with --reference-config",
    )
    fails(
        capsys,
        tmp_path,
        [path, out, "--reference-config", tmp_path / "no.yaml"],
        "cannot read the configuration .*no.yaml",
    )
    fails(capsys, tmp_path, [path, out, *flags, "--with-discriminator"], "has no discriminator to keep")
    whole_file = path.read_bytes()
    for cut in (10, 1000, len(whole_file) - 100):
        path.write_bytes(whole_file[:cut])
        fails(capsys, tmp_path, [path, out, *flags], "the checkpoint .* is (broken or cut short|refused)")
    path.write_bytes(b"")
    fails(capsys, tmp_path, [path, out, *flags], "broken or cut short")
    torch.save({"model": weights, "hook": Command(f"touch {mark}")}, path)
    fails(capsys, tmp_path, [path, out, *flags], "is refused: it asks for (posix|nt).system, and files that run code")
    torch.save({"model": weights, "arguments": argparse.Namespace(lr=1)}, path)
    fails(capsys, tmp_path, [path, out, *flags], "is refused: it asks for argparse.Namespace")
    path.write_bytes(pickle.dumps(Command(f"touch {mark}"), protocol=2))
    fails(capsys, tmp_path, [path, out, *flags], "is refused: ")
    for content in ({"epoch": 3}, {3: torch.zeros(1)}, {"a": torch.zeros(2, 2).to_sparse()}, torch.zeros(3)):
        torch.save(content, path)
        fails(capsys, tmp_path, [path, out, *flags], "no entry `state_dict` or `model` that holds tensors")
    torch.save({"epoch": 3}, path)
    fails(capsys, tmp_path, [path, out, *flags], "no entry `state_dict` or `model` that holds tensors")
    assert not mark.exists()


def test_wrong_calls(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for source in ("/no/such/folder", "./none", "nothing.pth", "a/b/c"):
        fails(capsys, tmp_path, [source, out], "there is no file or folder")
    fails(capsys, tmp_path, ["nobody/nothing", out], "cannot download nobody/nothing from the Hub")
    fails(capsys, tmp_path, ["no body", out], "neither a file, nor a folder, nor a Hub id")
    fails(capsys, tmp_path, [folder, folder], "exists already: choose a new folder")
    fails(capsys, tmp_path, [folder, folder / "config.json"], "exists already")
    fails(
        capsys,
        tmp_path,
        [folder, out, "--check-images", tmp_path / "none.png"],
        "there is no file or folder .*none.png",
    )
    fails(capsys, tmp_path, [folder, out, "--check-images", folder], "there are no image files in")
    fails(capsys, tmp_path, [folder, out, "--check-images", folder / "config.json"], "cannot read .*config.json")
    fails(capsys, tmp_path, [folder], "arguments are required: OUT", code=2)
    fails(capsys, tmp_path, [folder, out, "--keep"], "unknown argument --keep", code=2)


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for text in (
        "SOURCE",
        "OUT",
        "--reference-config",
        "--keep-batch-assignment",
        "--with-discriminator",
        "--check-images",
    ):
        assert text in shown
