"""Published autoencoders of other libraries at full size, on the meta device: every weight has its place, and none is left."""

import json
from functools import partial

import pytest
import torch

from grids import slow
from optvq_hf.publishing.autoencoders import make_model
from optvq_hf.publishing.diffusers_source import read_diffusers
from optvq_hf.publishing.llamagen_source import read_llamagen
from optvq_hf.publishing.reference_files import ReferenceFiles
from optvq_hf.publishing.taming_source import read_taming
from vqgan_reference import LLAMAGEN, TAMING, make_weights


SD_VAE = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "latent_channels": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "sample_size": 512,
}  # fmt: skip
FLUX_VAE = {
    **SD_VAE,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.1159,
}
AMUSED_VQ = {
    "block_out_channels": [128, 256, 256, 512, 768], "down_block_types": ["DownEncoderBlock2D"] * 5, "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 5, "latent_channels": 64, "num_vq_embeddings": 8192, "vq_embed_dim": 64,
    "mid_block_add_attention": False, "lookup_from_codebook": True, "sample_size": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "factor"),
    [
        pytest.param("AutoencoderKL", SD_VAE, 8, id="SD"),
        slow("AutoencoderKL", {**SD_VAE, "sample_size": 1024, "scaling_factor": 0.13025}, 8, id="SDXL"),
        pytest.param("AutoencoderKL", FLUX_VAE, 8, id="Flux"),
        pytest.param("VQModel", AMUSED_VQ, 16, id="aMUSEd"),
    ],
)
def test_full_sizes_of_diffusers(kind, settings, factor):
    import diffusers

    with torch.device("meta"):
        theirs = getattr(diffusers, kind)(**settings)
    files = ReferenceFiles("source", None, {**theirs.config, "_class_name": kind}, theirs.state_dict())
    files = files._replace(config=json.loads(json.dumps(files.config)))
    model, _ = make_model(read_diffusers(files, None))
    assert (model.config.downsample_factor, model.config.image_size) == (factor, settings["sample_size"])
    channels = settings["latent_channels"]
    ours = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("quantizer."))
    of_codes = sum(p.numel() for name, p in theirs.named_parameters() if name.startswith("quantize."))
    of_variance = 0
    if kind == "AutoencoderKL":
        rows = 2 * channels if settings.get("use_quant_conv", True) else 512 * 9
        of_variance = channels * (rows + 1)
    assert ours == theirs.num_parameters() - of_codes - of_variance
    if settings is SD_VAE:
        assert theirs.num_parameters() == 83_653_863


F16 = {"channels": 128, "multiplier": [1, 1, 2, 2, 4], "num_blocks": 2, "attention": {4}, "latent_channels": 256}
F8 = {**F16, "multiplier": [1, 2, 2, 4], "attention": {3}}


@pytest.mark.parametrize(
    ("library", "sizes", "millions"),
    [
        slow("taming", {**F16, "embed_dim": 256, "num_codes": 1024}, None),
        ("taming", {**F16, "embed_dim": 256, "num_codes": 16384}, None),
        ("taming", {**F8, "latent_channels": 4, "embed_dim": 4, "num_codes": 16384}, None),
        ("llamagen", {**F16, "embed_dim": 8, "num_codes": 16384}, 72),  # as its authors count
        ("llamagen", {**F8, "embed_dim": 8, "num_codes": 16384}, 70),
    ],
    ids=["f16-1024", "f16-16384", "f8-16384", "VQ-16", "VQ-8"],
)
def test_full_sizes_of_vqgans(library, sizes, millions):
    names = TAMING if library == "taming" else LLAMAGEN
    weights = make_weights(names, partial(torch.empty, device="meta"), **sizes)
    side = 256 // 2 ** (len(sizes["multiplier"]) - 1)
    ddconfig = {
        "double_z": False, "z_channels": sizes["latent_channels"], "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": sizes["multiplier"], "num_res_blocks": 2, "attn_resolutions": [side], "dropout": 0.0,
    }  # fmt: skip
    params = {"embed_dim": sizes["embed_dim"], "n_embed": sizes["num_codes"], "ddconfig": ddconfig}
    config = {"model": {"params": params}} if library == "taming" else {}
    read = read_taming if library == "taming" else read_llamagen
    model, _ = make_model(read(ReferenceFiles("source", None, config, weights), None))
    assert model.config.latent_size == side and model.config.codebook_size == sizes["num_codes"]
    assert model.num_parameters() == sum(tensor.numel() for tensor in weights.values())
    assert millions is None or round(model.num_parameters() / 1e6) == millions
