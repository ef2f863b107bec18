"""Autoencoders of other libraries that are broken, unsafe or not supported: one clear line, with nothing written."""

import argparse
import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from publishing.conversions import Command, fails
from vqgan_reference import LLAMAGEN, TAMING, make_weights


SIZES = {"channels": 32, "multiplier": [1, 1], "num_blocks": 1, "latent_channels": 4, "embed_dim": 4, "num_codes": 8}
DDCONFIG = {
    "double_z": False, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1],
    "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip
KL = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1", "block_out_channels": [32, 32], "sample_size": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
VQ = {**KL, "_class_name": "VQModel", "latent_channels": 4}


@pytest.fixture(scope="module")
def diffusers_weights():
    """Weights by the class that they are of."""
    import diffusers

    made = {}
    for config in (KL, VQ):
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        made[config["_class_name"]] = getattr(diffusers, config["_class_name"])(**settings).state_dict()
    return made


def changed(weights, **changes):
    """With these tensors instead; None takes one away."""
    weights = dict(weights)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    return weights


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({**KL, "_class_name": "AutoencoderOld"}, {}, "unknown _class_name 'AutoencoderOld'.* known are AutoencoderKL, VQM"),
        ({"model_type": "optvq"}, {}, "unknown _class_name None"),
        ({**KL, "blocks": 3}, {}, "unknown AutoencoderKL setting 'blocks'"),
        ({**KL, "act_fn": "relu"}, {}, "unknown act_fn 'relu' in the configuration; known are silu, swish"),
        ({**VQ, "norm_type": "spatial"}, {}, "norm_type 'spatial'; only 'group' is supported"),
        ({**KL, "out_channels": 1}, {}, "images have 3 channels, but reconstructions 1"),
        ({**KL, "down_block_types": ["DownEncoderBlock2D"]}, {}, "must be lists of equal length"),
        ({**KL, "block_out_channels": 32}, {}, "must be lists of equal length"),
        ({**KL, "block_out_channels": [32, "64"]}, {}, "block_out_channels must be a positive integer.* got '64'"),
        ({**KL, "block_out_channels": [64, 96]}, {}, r"must be multiples of the first, got \[64, 96\]"),
        ({**KL, "down_block_types": ["DownEncoderBlock2D", "DownBlock2D"]}, {}, "unknown down_block_types 'DownBlock2D'"),
        ({**KL, "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}, {}, "differ in the resolutions that have"),
        ({**KL, "sample_size": [32, 64]}, {}, "not square: choose an --image-size"),
        ({**KL, "sample_size": 33}, {}, "image_size must be divisible by the downsampling factor 2, got 33"),
        ({**KL, "use_quant_conv": False}, {}, "use_quant_conv and use_post_quant_conv differ"),
        ({**KL, "use_quant_conv": 1}, {}, "use_quant_conv must be true or false"),
        ({**KL, "sample_size": [[32], []]}, {}, "not square"),
        ({**KL, "shift_factor": float("nan")}, {}, "scaling_factor and shift_factor must be numbers.* 0.18215 and nan"),
        ({**KL, "scaling_factor": 0}, {}, "scaling_factor and shift_factor must be numbers"),
        ({**KL, "latents_mean": "x"}, {}, "latents_mean and latents_std must be lists of 4 numbers.* got 'x' and None"),
        ({**KL, "latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, {}, "must be lists of 4 numbers"),
        ({**KL, "latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, {}, "latents_std must be above 0"),
        ({**KL, "norm_num_groups": 24}, {}, "base_channels must be a multiple of 24"),
        ({**KL, "layers_per_block": 10**9}, {}, "at most 1000 residual blocks"),
        ({**KL, "layers_per_block": 2}, {}, "missing: decoder.stages.0.resnets.2.*; and 26 more"),
        ({**KL, "mid_block_add_attention": False}, {}, "not known: decoder.mid_block.attentions.0"),
        ({**KL, "latent_channels": 8}, {}, "quant_conv.weight is .8, 8, 1, 1., and must have 16 outputs"),
        ({**VQ, "num_vq_embeddings": 64}, {}, "wrong shape: quantize.embedding.weight is .256, 4., not .64, 4."),
        ({**VQ, "num_vq_embeddings": "64"}, {}, "num_vq_embeddings must be a positive integer"),
        (KL, {"encoder__conv_in__weight": None}, "missing: encoder.conv_in.weight"),
        (KL, {"encoder__conv_in__bias": torch.full((32,), float("inf"))}, "NaN or inf: encoder.conv_in.bias"),
        (KL, {"encoder__conv_in__bias": torch.zeros(32, dtype=torch.int8)}, "wrong dtype: encoder.conv_in.bias"),
        (KL, {"extra": torch.zeros(1)}, "not known: extra"),
        (KL, {"decoder__mid_block__attentions__0__query__weight": torch.zeros(32, 32)}, "one tensor twice.*query.*to_q"),
    ],
)  # fmt: skip
def test_diffusers(config, changes, message, diffusers_weights, tmp_path, capsys):
    folder = tmp_path / "source"
    folder.mkdir()
    weights = diffusers_weights["VQModel" if config.get("_class_name") == "VQModel" else "AutoencoderKL"]
    save_file(changed(weights, **changes), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    fails(capsys, tmp_path, [folder, tmp_path / "out", "--from", "diffusers", "--license", "mit"], message)


def taming_files(folder, weights=None, **changes):
    """A checkpoint, and its configuration with other parameters of the model."""
    if weights is None:
        weights = make_weights(TAMING, torch.zeros, attention={1}, **SIZES)
    torch.save({"state_dict": weights}, folder / "last.ckpt")
    params = {"embed_dim": 4, "n_embed": 8, "ddconfig": DDCONFIG, **changes}
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ddconfig": None}, "has no entry 'ddconfig': is it one of taming-transformers"),
        ({"n_embed": None}, "n_embed must be a positive integer"),
        ({"embed_dim": 6}, "wrong shape: .*quant_conv.weight"),
        ({"ddconfig": {**DDCONFIG, "double_z": True}}, "has double_z: True; only False is supported"),
        ({"ddconfig": {**DDCONFIG, "attn_type": "linear"}}, "unknown attn_type 'linear'.* known are vanilla, none"),
        (
            {"ddconfig": {**DDCONFIG, "ch_mult": "1, 1"}},
            "ch_mult must be a list of positive integers in the configuration, got '1, 1'",
        ),
        ({"ddconfig": {**DDCONFIG, "ch_mult": 2}}, "ch_mult must be a list of positive integers .* got 2"),
        ({"ddconfig": {**DDCONFIG, "ch_mult": None}}, "ch_mult must be a list of positive integers .* got None"),
        (
            {"ddconfig": {**DDCONFIG, "ch_mult": [1, "1"]}},
            "every entry of ch_mult must be a positive integer .* got '1'",
        ),
        ({"ddconfig": {**DDCONFIG, "attn_resolutions": 16}}, "does not make a model: .*attn_resolutions"),
        ({"ddconfig": {**DDCONFIG, "attn_resolutions": [32]}}, "missing: decoder.stages.1.attentions.0.key.bias"),
    ],
)
def test_taming(changes, message, tmp_path, capsys):
    taming_files(tmp_path, **changes)
    fails(capsys, tmp_path, [tmp_path, tmp_path / "out", "--from", "taming", "--license", "mit"], message)


def test_weights_of_other_models(tmp_path, capsys):
    weights = make_weights(TAMING, torch.zeros, attention={1}, **SIZES)
    flags = [tmp_path / "out", "--license", "mit", "--from"]
    taming_files(tmp_path, {**weights, "quantize.used": torch.arange(8)})
    fails(capsys, tmp_path, [tmp_path, *flags, "taming"], "the source renumbers its codes .remap, tensor quantize.used")
    fails(
        capsys,
        tmp_path,
        [tmp_path / "last.ckpt", *flags, "llamagen"],
        "not those of a tokenizer of LlamaGen: they lack encoder.conv_blocks.0.res.0.conv1.weight",
    )
    taming_files(tmp_path, {f"first_stage_model.{name}": tensor for name, tensor in weights.items()})
    message = "none has a name of theirs, the first is first_stage_model.decoder.conv_in.bias"
    fails(capsys, tmp_path, [tmp_path, *flags, "taming"], message)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"codebook_size": 9}, {}, "the configuration has codebook_size 9, and the weights 8"),
        ({"encoder_ch_mult": [1, 2]}, {}, r"encoder_ch_mult \[1, 2\], and the weights \[1, 1\]"),
        ({"codebook_l2_norm": "yes"}, {}, "codebook_l2_norm must be true or false"),
        ({"lookup_free": True}, {}, "unknown LlamaGen setting 'lookup_free'"),
        ({}, {"quantize__embedding__weight": None}, "a tokenizer of LlamaGen: they lack quantize.embedding.weight"),
        ({}, {"encoder__conv_in__weight": torch.zeros(32)}, "they lack encoder.conv_in.weight"),
        ({}, {"encoder__conv_in__weight": torch.zeros(0, 3, 3, 3)}, "does not make a model: .*base_channels|greater than 0"),
        ({}, {"decoder__mid__1__q__weight": None}, "missing: decoder.mid.attention.query.weight"),
        ({}, {"encoder__conv_blocks__0__res__0__conv1__weight": None}, "they lack encoder.conv_blocks.0.res.0.conv1.weight"),
        ({}, {"quantize__embedding__weight": torch.zeros(8, 4, dtype=torch.float8_e4m3fn)}, "wrong dtype: quantize.embedding"),
    ],
)  # fmt: skip
def test_llamagen(config, change, message, tmp_path, capsys):
    weights = changed(make_weights(LLAMAGEN, torch.ones, attention={1}, **SIZES), **change)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    fails(capsys, tmp_path, [tmp_path, tmp_path / "out", "--from", "llamagen", "--license", "mit"], message)


def test_unsafe_and_broken_pickles(tmp_path, capsys):
    taming_files(tmp_path)
    path, mark = tmp_path / "last.ckpt", tmp_path / "mark"
    whole = path.read_bytes()

    def refused(message, *argv, **expected):
        fails(capsys, tmp_path, argv, message, **expected)

    flags = [tmp_path / "out", "--from", "taming", "--license", "mit"]
    refused("does not contain its configuration: name its YAML", path, *flags)
    path.write_bytes(whole[:-100])
    refused("the checkpoint .* is (broken or cut short|refused)", tmp_path, *flags)
    weights = torch.load(path.write_bytes(whole) and path, weights_only=True)["state_dict"]
    for hook in (Command(f"touch {mark}"), argparse.Namespace(lr=1)):
        torch.save({"state_dict": weights, "hook": hook}, path)
        refused("is refused: it asks for (posix.system|nt.system|argparse.Namespace)", tmp_path, *flags)
    torch.save({"epoch": 3}, path)
    refused("no entry `state_dict` or `model` that holds tensors", tmp_path, *flags)
    (tmp_path / "model.yaml").write_text("model: [")
    refused("the configuration .*model.yaml is broken", tmp_path, *flags)
    path.unlink()
    refused("has no weights: neither checkpoints/last.ckpt nor last.ckpt", tmp_path, *flags)
    assert not mark.exists()


def test_wrong_calls(tmp_path, capsys):
    taming_files(tmp_path)
    out = tmp_path / "out"

    def refused(message, *argv, **expected):
        fails(capsys, tmp_path, argv, message, **expected)

    refused("does not state the licence of its weights: name it with --license", tmp_path, out, "--from", "taming")
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    refused("does not state the licence of its weights", tmp_path, out, "--from", "taming")
    refused(
        "has no weights in vae, vqvae or itself: neither diffusion_pytorch_model", tmp_path, out, "--from", "diffusers"
    )
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model-00001-of-00002.safetensors"):
        (tmp_path / "vae").mkdir(exist_ok=True)
        (tmp_path / "vae" / name).touch()
        refused(f"; {name} is a part or a variant: save the weights as one file", tmp_path, out, "--from", "diffusers")
    for license in ("m i t\nx: [1", "", "-mit"):
        message = "--license must be an identifier as mit, apache-2.0 or other, got|license"
        refused(message, tmp_path, out, "--from", "diffusers", f"--license={license}", code=2)
    refused("there is no file or folder ./none", "./none", out, "--from", "llamagen")
    refused("argument --from: invalid choice: 'vae'", tmp_path, out, "--from", "vae", code=2)
    for flag in ("--codebook-size", "--num-codebook-heads", "--image-size"):
        refused(f"{flag} is for sources of other libraries", tmp_path, out, flag, "2", code=2)
        for number in ("0", "-1"):
            refused(f"{flag} must be at least 1, got {number}", tmp_path, out, "--from", "taming", flag, number, code=2)
    for flag in ("--keep-batch-assignment", "--with-discriminator"):
        refused(f"{flag} is for models of the original", tmp_path, out, flag, "--from", "taming", code=2)
    wrong = ["--from", "taming", "--license", "mit", "--num-codebook-heads"]
    refused("codebook_dim must be divisible by num_codebook_heads, got 4 and 3", tmp_path, out, *wrong, "3")
