"""Tokenizers of other libraries are evaluated as their own code reconstructs."""

import pytest
import torch
from diffusers import VQModel
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from builders import make
from optvq_hf.evaluation.codecs import diffusers_codec, optvq_codec, transformers_codec
from optvq_hf.evaluation.evaluator import evaluate_codecs


SMALL = {"embed_dim": 4, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}


def make_images(number=5, height=32, width=32):
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def check(codec, images, codes, reconstructions, size):
    """The evaluator's figures are those of given codes (B, heads, h, w) and reconstructions."""
    result = evaluate_codecs({"it": codec}, images.split(2))["it"]
    expected = (reconstructions.clamp(-1, 1) - images).square().mean().item()
    assert result.metrics["mse"] == pytest.approx(expected, rel=1e-5) and result.metrics["num_images"] == len(images)
    assert codec.codebook_size == size and len(codes.unique()) > 5
    assert torch.equal(
        result.code_counts[0], torch.stack([c.flatten().bincount(minlength=size) for c in codes.unbind(1)])
    )
    return result


@torch.no_grad()
def test_emu3():
    torch.manual_seed(0)
    sizes = {"codebook_size": 64, "latent_channels": 4, "attn_resolutions": [16], "hidden_size": 64}
    model = Emu3VQVAE(Emu3VQVAEConfig(**SMALL, **sizes, num_attention_heads=2)).eval()
    images = make_images(width=48)
    tokens = torch.stack(list(model.encode(images, image_sizes=torch.tensor([[32, 48]] * 5)).image_tokens))
    result = check(transformers_codec(model), images, tokens[:, None], model.decode(tokens), 64)
    assert result.metrics["bits_per_pixel"] == pytest.approx(6 / 4)  # 6 bits for every 2 x 2 pixels


@torch.no_grad()
def test_janus():
    torch.manual_seed(0)
    sizes = {"num_embeddings": 64, "latent_channels": 32, "num_patches": 16, "hidden_size": 32}
    model = JanusVQVAE(JanusVQVAEConfig(**SMALL, **sizes)).eval()
    images = make_images()
    tokens = model.encode(images).image_tokens.view(5, 1, 16, 16)
    check(transformers_codec(model), images, tokens, model(images).decoded_pixel_values, 64)


def test_a_module_that_cannot_decode():
    model = ChameleonVQVAE(ChameleonVQVAEConfig(num_embeddings=16, resolution=32, **SMALL, latent_channels=32))
    with pytest.raises(ValueError, match="ChameleonVQVAE cannot be evaluated: it has no encode and decode of images"):
        transformers_codec(model)


@pytest.mark.parametrize("looks_up", [False, True])
@torch.no_grad()
def test_diffusers(looks_up):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = VQModel(
        block_out_channels=(16, 32), norm_num_groups=8, num_vq_embeddings=64, lookup_from_codebook=looks_up, **blocks
    ).eval()
    model.quantize.embedding.weight.normal_()
    images = make_images()
    latents = model.encode(images).latents
    codes = model.quantize(latents)[2][2].view(5, 1, 16, 16)
    check(diffusers_codec(model), images, codes, model(images).sample, 64)


@torch.no_grad()
def test_ours():
    model, images = make(), make_images()
    for assignment in ("nearest", None):
        check(optvq_codec(model, assignment), images, model.encode(images).codes, model(images).reconstruction, 128)
