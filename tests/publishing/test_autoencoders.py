"""Autoencoders of other libraries, converted: latents, pictures and codes are those of the source."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from builders import pixels
from optvq_hf import OptVQModel
from optvq_hf.commands.cli import main
from optvq_hf.publishing import reference_files
from vqgan_reference import LLAMAGEN, TAMING, latents_of, make_weights, nearest_of, pictures_of


# In float64: in float32, two orders of the same sums differ by up to 5e-5 in these networks.
equal = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
IMAGES = pixels(2, 3, 32, 32, dtype=torch.float64)
SMALL_KL = {
    "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "sample_size": 32,
}  # fmt: skip
SMALL_VQ = {
    **SMALL_KL, "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), "num_vq_embeddings": 256, "layers_per_block": 2,
}  # fmt: skip


def random_weights(seed=0):
    """Makes weights that float32 holds, none like another's and none without effect; sums stay near 1."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        drawn = torch.randn(*shape, generator=generator)
        return (1 + drawn / 4 if len(shape) == 1 else drawn / drawn[0].numel() ** 0.5).double()

    return make


def in_float32(weights):
    return {name: tensor.float() for name, tensor in weights.items()}


def save_diffusers(kind, folder, **settings):
    """A model of diffusers with such weights, saved in float32 with a card."""
    import diffusers

    model = getattr(diffusers, kind)(**settings).eval()
    make = random_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(make(*parameter.shape))
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: openrail\n---\n# A model\n")
    return model.double()


def convert(source, out, *flags):
    main(["convert", str(source), str(out), *map(str, flags)])
    return OptVQModel.from_pretrained(out).double()


def bypassed(model):
    """Latents and reconstructions without quantization."""
    model.train()
    model.quantizer.bypass = True
    with torch.no_grad():
        output = model(IMAGES, assignment="nearest")
    model.quantizer.bypass = False
    model.eval()
    return output


# ---- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.5, "scaling_factor": 2.0},
        {"mid_block_add_attention": False, "norm_num_groups": 16, "layers_per_block": 2},
    ],
    ids=["connectors", "none", "no attention"],
)
@torch.no_grad()
def test_autoencoder_kl(settings, tmp_path, capsys):
    theirs = save_diffusers("AutoencoderKL", tmp_path / "vae", **{**SMALL_KL, **settings})
    model = convert(tmp_path / "vae", tmp_path / "out", "--from", "diffusers", "--codebook-size", 32)
    mean = theirs.encode(IMAGES).latent_dist.mean
    equal(model.encode(IMAGES).latents, mean)
    output = bypassed(model)
    equal(output.latents, mean)
    equal(output.reconstruction, theirs.decode(mean).sample)

    # New codes lie where the source's scaling says that latents are.
    shift, factor = settings.get("shift_factor", 0.0), settings.get("scaling_factor", 0.18215)
    unit = (model.get_codebook() - shift) * factor
    assert unit.shape == (32, 4) and abs(unit.mean()) < 0.3 and 0.8 < unit.std() < 1.2
    assert not model.config.use_codebook_projection and model.config.training_assignment == "sinkhorn"
    assert "32 x 32 images to 16 x 16 tokens of 1 codes in 32" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (record["license"], record["source"], record["left_out"]) == (
        "openrail",
        "vae",
        ["the variance of its latents"],
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "openrail"
    for text in (
        "encoder and decoder of `AutoencoderKL` of diffusers",
        "new and untrained",
        f"scaling_factor {factor:g}",
    ):
        assert text in card.text, text
    assert "original" not in card.text.split("## Citation")[0]


@pytest.mark.parametrize(
    "settings", [{"vq_embed_dim": 6}, {"mid_block_add_attention": False}], ids=["width", "no attention"]
)
@torch.no_grad()
def test_vq_model(settings, tmp_path):
    theirs = save_diffusers("VQModel", tmp_path / "repository" / "vqvae", **{**SMALL_VQ, **settings})
    flags = ["--from", "diffusers", "--license", "other", "--image-size", "64"]
    model = convert(tmp_path / "repository", tmp_path / "out", *flags)
    latents = theirs.encode(IMAGES).latents
    output = bypassed(model)
    equal(output.latents, latents)
    equal(output.reconstruction, theirs.decode(latents, force_not_quantize=True).sample)
    quantized, _, (_, _, indices) = theirs.quantize(latents)
    encoded = model.encode(IMAGES)
    assert torch.equal(encoded.codes.flatten(), indices) and indices.unique().numel() > 5
    equal(encoded.quantized, quantized)
    equal(model.decode(codes=encoded.codes).reconstruction, theirs.decode(latents).sample)
    assert torch.equal(model.get_codebook(), theirs.quantize.embedding.weight)
    assert model.config.image_size == 64
    assert "Its licence has no identifier" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_a_new_codebook_for_old_codes(tmp_path):
    """As in VQ-Transplant: encoder and decoder stay, and the quantizer is another one."""
    theirs = save_diffusers("VQModel", tmp_path / "vq", **SMALL_VQ)
    flags = ["--from", "diffusers", "--num-codebook-heads", 2, "--codebook-size", 40]
    model = convert(tmp_path / "vq", tmp_path / "out", *flags)
    equal(bypassed(model).latents, theirs.encode(IMAGES).latents)
    codes = model.get_codebook()
    assert codes.shape == (40, 2) and 0.7 < codes.std() / theirs.quantize.embedding.weight.std() < 1.4
    again = convert(tmp_path / "vq", tmp_path / "again", *flags)
    assert torch.equal(again.get_codebook(), codes)


@torch.no_grad()
def test_new_codes_lie_where_every_channel_lies(tmp_path):
    mean, deviation = [-30.0, 0.0, 10.0, 30.0], [1.0, 2.0, 3.0, 0.5]
    settings = {"latents_mean": mean, "latents_std": deviation, "scaling_factor": 0.5}
    save_diffusers("AutoencoderKL", tmp_path / "vae", **SMALL_KL, **settings)
    codes = convert(tmp_path / "vae", tmp_path / "out", "--from", "diffusers", "--codebook-size", 256).get_codebook()
    centres, spreads = torch.tensor(mean).double(), 2 * torch.tensor(deviation).double()
    assert (codes.mean(dim=0) - centres).abs().lt(spreads / 4).all()
    torch.testing.assert_close(codes.std(dim=0), spreads, rtol=0.2, atol=0)
    assert f"latents_mean {mean}, latents_std {deviation}" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_attention_had_other_names(tmp_path):
    """In old files, as those of the first Stable Diffusion; half precision stays."""
    theirs = save_diffusers("AutoencoderKL", tmp_path / "vae", **SMALL_KL)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        weights[name] = tensor.bfloat16()
    assert sum("proj_attn" in name for name in weights) == 4
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    model = convert(tmp_path / "vae", tmp_path / "out", "--from", "diffusers")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16, torch.float32, torch.int64}  # the last two are the running state
    assert model.config.codebook_size == 16384
    equal(model.encode(IMAGES).latents, theirs.bfloat16().double().encode(IMAGES).latent_dist.mean)


@pytest.mark.parametrize("link", ["LICENSE.md", "https://example.com/license"])
def test_a_licence_without_an_identifier(tmp_path, monkeypatch, link):
    save_diffusers("AutoencoderKL", tmp_path / "abc123", **SMALL_KL)
    card = f"---\nlicense: other\nlicense_name: some-licence\nlicense_link: {link}\n---\n"
    (tmp_path / "abc123" / "README.md").write_text(card)
    monkeypatch.setattr(reference_files, "snapshot_download", lambda *_, **__: tmp_path / "abc123")
    for number, source in enumerate(("someone/something", tmp_path / "abc123")):
        convert(source, tmp_path / str(number), "--from", "diffusers", "--codebook-size", "8")
        card = ModelCard.load(tmp_path / str(number) / "README.md")
        assert (card.data.license, card.data.license_name) == ("other", "some-licence")
        of_hub = f"https://huggingface.co/someone/something/blob/abc123/{link}" if number == 0 else None
        assert card.data.get("license_link") == (link if "://" in link else of_hub)
        assert "Licence of the weights: other, some-licence" in card.text


def test_a_hub_id_and_a_recipe(tmp_path, monkeypatch):
    save_diffusers("AutoencoderKL", tmp_path / "abc123" / "vae", **SMALL_KL)
    shutil.move(tmp_path / "abc123" / "vae" / "README.md", tmp_path / "abc123")
    asked = []

    def download(name, revision=None, allow_patterns=()):
        assert name == "someone/something" and revision == ("abc123" if asked else None)
        asked.extend(allow_patterns)
        return tmp_path / "abc123"

    monkeypatch.setattr(reference_files, "snapshot_download", download)
    (tmp_path / "recipe.yaml").write_text("from: diffusers\ncodebook_size: 8\n")
    model = convert("someone/something", tmp_path / "out", "--config", tmp_path / "recipe.yaml")
    assert model.config.codebook_size == 8 and {"README.md", "config.json", "vae/config.json"} <= set(asked)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "someone/something" and "revision `abc123`" in card.text


def test_weights_in_two_formats_are_downloaded_once(tmp_path, alice, hub):
    save_diffusers("AutoencoderKL", tmp_path / "both" / "vae", **SMALL_KL)
    shutil.move(tmp_path / "both" / "vae" / "README.md", tmp_path / "both")
    (tmp_path / "both" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"the same in another format")
    HfApi().create_repo("alice/formats")
    HfApi().upload_folder(repo_id="alice/formats", folder_path=tmp_path / "both")
    hub.requests.clear()
    assert (
        convert("alice/formats", tmp_path / "out", "--from", "diffusers", "--codebook-size", "8").config.codebook_size
        == 8
    )
    downloaded = {path.partition("/resolve/")[2] for method, path, _ in hub.requests if "/resolve/" in path}
    names = {name.partition("/")[2] for name in downloaded}
    assert names == {"README.md", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}


# ---- taming-transformers and LlamaGen --------------------------------------------------------------------------------

SIZES = {
    "channels": 32,
    "multiplier": [1, 2, 2],
    "num_blocks": 1,
    "latent_channels": 12,
    "embed_dim": 6,
    "num_codes": 256,
}
DDCONFIG = {
    "double_z": False, "z_channels": 12, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 2],
    "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip


class ModelCheckpoint:
    """Checkpoints of PyTorch Lightning name this class."""


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


def save_taming(folder: Path, weights, monkeypatch, **ddconfig) -> Path:
    """A training folder as PyTorch Lightning writes it, in float32, with the networks of the objective."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "configs").mkdir()
    others = ("loss.perceptual_loss.lin0.model.1.weight", "model_ema.decay", "colorize")
    others += ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
    loss = {name: torch.zeros(1, 4, 1, 1) for name in others}
    content = {
        "state_dict": {**in_float32(weights), **loss},
        "callbacks": {ModelCheckpoint: {"best_model_path": ""}},
        "epoch": 3,
    }
    with monkeypatch.context() as patch:
        module = SimpleNamespace(ModelCheckpoint=ModelCheckpoint)
        for name in ("pytorch_lightning", ModelCheckpoint.__module__):
            patch.setitem(sys.modules, name, module)
        torch.save(content, folder / "checkpoints" / "last.ckpt")
    params = {"embed_dim": 6, "n_embed": 256, "monitor": "val/rec_loss", "ddconfig": {**DDCONFIG, **ddconfig}}
    model = {"target": "taming.models.vqgan.VQModel", "base_learning_rate": 4.5e-6, "params": params}
    (folder / "configs" / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    return folder


@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_taming(attention, tmp_path, monkeypatch):
    weights = make_weights(TAMING, random_weights(), attention={1} if attention else set(), **SIZES)
    weights = {name: tensor for name, tensor in weights.items() if attention or ".attn_1." not in name}
    changes = {} if attention else {"attn_type": "none"}
    source = save_taming(tmp_path / "taming", weights, monkeypatch, **changes)
    model = convert(source, tmp_path / "out", "--from", "taming", "--license", "mit")
    latents = latents_of(TAMING, weights, IMAGES)
    output = bypassed(model)
    equal(output.latents, latents)
    equal(output.reconstruction, pictures_of(TAMING, weights, latents))
    codes = nearest_of(weights["quantize.embedding.weight"], latents)
    encoded = model.encode(IMAGES)
    assert torch.equal(encoded.codes[:, 0], codes) and codes.unique().numel() > 5
    assert torch.equal(model.get_codebook(), weights["quantize.embedding.weight"])
    quantized = F.embedding(codes, weights["quantize.embedding.weight"]).movedim(-1, 1)
    equal(model.decode(codes=encoded.codes).reconstruction, pictures_of(TAMING, weights, quantized))
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "without the networks of its training objective",
        "its EMA codebook",
        "the EMA of its weights",
        "colours",
    ):
        assert card.count(part) == 1, part
    assert "Its codes are those of the source" in card


@torch.no_grad()
def test_codes_of_a_gumbel_quantizer(tmp_path, monkeypatch):
    """They are kept; what chose them is not: here distance does."""
    weights = make_weights(TAMING, random_weights(), attention={1}, **SIZES)
    codes = weights.pop("quantize.embedding.weight")
    weights |= {"quantize.embed.weight": codes, "quantize.proj.weight": torch.zeros(256, 12, 1, 1)}
    source = save_taming(tmp_path / "taming", weights, monkeypatch)
    files = [source / "checkpoints" / "last.ckpt", "--reference-config", source / "configs" / "model.yaml"]
    model = convert(files[0], tmp_path / "out", "--from", "taming", "--license", "mit", *files[1:], "--image-size", 64)
    assert torch.equal(model.get_codebook(), codes)
    assert "the convolution that chose its codes" in (tmp_path / "out" / "README.md").read_text()
    equal(bypassed(model).latents, latents_of(TAMING, weights, IMAGES))  # attention stands where it was


@pytest.mark.parametrize("normalized", [True, False])
@torch.no_grad()
def test_llamagen(normalized, tmp_path):
    weights = make_weights(LLAMAGEN, random_weights(), attention={2}, **SIZES)
    used = {"quantize.codebook_used": torch.zeros(65536)}
    if normalized:
        source = tmp_path / "vq.pt"
        ema, later = in_float32(weights) | used, {"encoder.conv_in.bias": torch.zeros(3)}
        torch.save({"model": ema | later, "ema": ema, "steps": 3}, source)
    else:
        source = tmp_path / "folder"
        source.mkdir()
        save_file(in_float32(weights) | used, source / "model.safetensors")
        (source / "config.json").write_text(json.dumps({"codebook_l2_norm": False, "encoder_ch_mult": [1, 2, 2]}))
    model = convert(source, tmp_path / "out", "--from", "llamagen", "--license", "mit", "--image-size", 32)

    latents, codes = latents_of(LLAMAGEN, weights, IMAGES), weights["quantize.embedding.weight"]
    if normalized:
        latents, codes = (tensor / tensor.norm(dim=1, keepdim=True) for tensor in (latents, codes))
    output = bypassed(model)
    equal(output.latents, latents)
    equal(output.reconstruction, pictures_of(LLAMAGEN, weights, latents))
    equal(model.get_codebook(), codes)
    chosen = nearest_of(codes, latents)
    encoded = model.encode(IMAGES)
    assert torch.equal(encoded.codes[:, 0], chosen) and chosen.unique().numel() > 5
    expected = pictures_of(LLAMAGEN, weights, F.embedding(chosen, codes).movedim(-1, 1))
    equal(model.decode(codes=encoded.codes).reconstruction, expected)
    assert model.config.cost == ("cosine" if normalized else "euclidean")
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("Latents have length 1", "codes are those of the source, scaled to length 1", "entry `ema`"):
        assert (text in card) == normalized
    if normalized:
        flags = ["--from", "llamagen", "--license", "mit", "--codebook-size", 16, "--num-codebook-heads", 2]
        new = convert(source, tmp_path / "new", *flags).get_codebook()
        torch.testing.assert_close(new.norm(dim=1), torch.full((16,), 0.5**0.5).double())
        assert "scaled to length 1" not in (tmp_path / "new" / "README.md").read_text()


def test_loads_from_the_folder_as_before(tmp_path):
    """A converted folder is an OptVQ folder: fields that decide layers are saved, and weights are those of the file."""
    save_diffusers("AutoencoderKL", tmp_path / "vae", **{**SMALL_KL, "mid_block_add_attention": False})
    model = convert(tmp_path / "vae", tmp_path / "out", "--from", "diffusers", "--codebook-size", 8)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["double_z"] is True and stored["mid_block_add_attention"] is False and stored["norm_num_groups"] == 32
    source = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(model.encoder.conv_out.weight, source["encoder.conv_out.weight"])
    assert torch.equal(model.quant_conv.weight, source["quant_conv.weight"][:4])
