import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from builders import make, make_untrained, pixels, spread, vqgan_config
from grids import slow
from optvq_hf import tiling_optvq
from optvq_hf.backbone_optvq import OptVQMidBlock
from optvq_hf.tiling_optvq import Layer, run_in_tiles


FIELDS = ("quantized", "codes", "latents", "quantizer_loss", "perplexity", "code_counts")


def local_vqgan(**fields):
    """A VQGAN without attention."""
    model = make_untrained(vqgan_config(attn_resolutions=(), **fields))
    for block in [block for block in model.modules() if isinstance(block, OptVQMidBlock)]:
        block.attention = nn.Identity()
    return spread(model)


def both(model, size, tile_size, batch=1):
    """Outputs of a model for noise of that size: whole and in tiles, encoded and decoded."""
    pixel_values = pixels(batch, model.config.num_channels, *size)
    whole, tiled = model.encode(pixel_values), model.encode(pixel_values, tile_size=tile_size)
    decoded = [model.decode(codes=whole.codes, tile_size=size).reconstruction for size in (None, tile_size)]
    assert [name for name in whole if name in FIELDS] == [name for name in tiled if name in FIELDS] == list(whole)[:6]
    return whole, tiled, *decoded


def jump(image, reference, every):
    """By how much the error jumps across the borders of tiles of that side, and elsewhere: two means."""
    error = (image - reference)[..., :, 1:] - (image - reference)[..., :, :-1]
    is_border = torch.arange(1, image.shape[-1]) % every == 0
    return error[..., is_border].abs().mean(), error[..., ~is_border].abs().mean()


# ---- local networks --------------------------------------------------------------------------------------------------

SIZES = [(36, 52), (100, 64), (132, 204), slow((260, 388))]


@pytest.fixture(scope="module")
def plain_cnn():
    return make()


@pytest.mark.parametrize("tile_size", [32, 47, 100, 128])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_the_plain_cnn_gives_the_same_to_the_last_bit(plain_cnn, size, tile_size):
    whole, tiled, of_whole, of_tiles = both(plain_cnn, size, tile_size, batch=2)
    assert all(torch.equal(whole[name], tiled[name]) for name in FIELDS)
    assert torch.equal(of_whole, of_tiles)
    assert whole.codes.unique().numel() > 50


@torch.no_grad()
def test_transport_is_over_all_tokens_whatever_the_tiles(plain_cnn):
    pixel_values = pixels(2, 3, 64, 96)
    whole = plain_cnn.encode(pixel_values, assignment="sinkhorn").codes
    assert torch.equal(plain_cnn.encode(pixel_values, assignment="sinkhorn", tile_size=32).codes, whole)
    assert not torch.equal(plain_cnn.encode(pixel_values).codes, whole)


@pytest.mark.parametrize(
    "multiplier, size, tile_size",
    [
        ((1, 1), (36, 52), 20),
        ((1, 1, 1), (40, 60), 28),
        slow((1, 2, 2), (76, 44), 32),
        slow((1, 1, 1, 2), (72, 136), 64),
    ],
)
@torch.no_grad()
def test_norms_have_the_statistics_of_the_whole_image(multiplier, size, tile_size):
    model = local_vqgan(channel_multiplier=multiplier)
    whole, tiled, of_whole, of_tiles = both(model, size, tile_size)
    torch.testing.assert_close(tiled.latents, whole.latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(of_tiles, of_whole, rtol=0, atol=2e-5)
    assert torch.equal(tiled.codes, whole.codes) and whole.codes.unique().numel() > 20


@torch.no_grad()
def test_every_image_of_a_batch_has_statistics_of_its_own():
    model = local_vqgan(channel_multiplier=(1, 1))
    pixel_values = pixels(2, 3, 24, 24) * torch.tensor([1.0, 0.1])[:, None, None, None]
    quantized = model.encode(pixel_values).quantized
    tiled = model.decode(quantized, tile_size=16).reconstruction
    torch.testing.assert_close(tiled, model.decode(quantized).reconstruction, rtol=0, atol=2e-5)


@torch.no_grad()
def test_weights_that_accelerate_keeps_elsewhere():
    model = local_vqgan(channel_multiplier=(1, 1))
    pixel_values = pixels(1, 3, 24, 32)
    expected = model.encode(pixel_values, tile_size=16)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.encoder.parameters())
    encoded = model.encode(pixel_values, tile_size=16)
    assert torch.equal(encoded.latents, expected.latents) and torch.equal(encoded.codes, expected.codes)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.bfloat16, 0.06)], ids=str)
@torch.no_grad()
def test_other_precisions(dtype, tolerance):
    model = local_vqgan(channel_multiplier=(1, 1)).to(dtype)
    latents = model.encode(pixels(1, 3, 24, 32)).latents
    tiled = model.encode(pixels(1, 3, 24, 32), tile_size=16).latents
    assert tiled.dtype == latents.dtype == dtype
    torch.testing.assert_close(tiled, latents, rtol=0, atol=tolerance)


# ---- attention -------------------------------------------------------------------------------------------------------


def attending():
    """A VQGAN with attention over maps of 8 values for every pixel, more than the 3 of the picture."""
    return spread(make_untrained(vqgan_config(channel_multiplier=(1, 1), attn_resolutions=(), latent_channels=8)))


@torch.no_grad()
def test_attention_over_small_maps_is_that_of_the_whole_image():
    model = spread(make_untrained(vqgan_config(channel_multiplier=(1, 1, 1, 1), attn_resolutions=(4,))))
    whole, tiled, of_whole, of_tiles = both(model, (40, 56), 24)
    torch.testing.assert_close(tiled.latents, whole.latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(of_tiles, of_whole, rtol=0, atol=2e-5)


@torch.no_grad()
def test_attention_over_large_maps_is_blended(monkeypatch):
    model = attending()
    whole, tiled, of_whole, of_tiles = both(model, (32, 64), 32)
    assert (of_tiles - of_whole).abs().mean() > 1e-4
    assert (tiled.latents - whole.latents).abs().mean() < 0.05 * whole.latents.abs().mean()
    assert (of_tiles - of_whole).abs().mean() < 0.05 * of_whole.abs().mean()
    across, elsewhere = jump(of_tiles, of_whole, every=32)
    assert across < 2 * elsewhere  # no step where the tiles meet
    monkeypatch.setattr(tiling_optvq._Segment, "overlap", 0)
    cut = model.decode(whole.quantized, tile_size=32).reconstruction
    assert jump(cut, of_whole, every=32)[0] > 2 * across
    same = model.decode(whole.quantized, tile_size=64).reconstruction  # one tile
    assert torch.equal(same, of_whole)


@torch.no_grad()
def test_blended_tiles_sum_to_one():
    """With tiles that all say 1, the blended picture is 1, up to its corners."""
    model = attending()
    model.decoder.conv_out.weight.zero_()
    model.decoder.conv_out.bias.fill_(1)
    quantized = torch.randn(1, 32, 20, 34, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        model.decode(quantized, tile_size=16).reconstruction, torch.ones(1, 3, 40, 68), rtol=0, atol=1e-6
    )


# ---- memory and geometry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder", "decoder"])
@torch.no_grad()
def test_no_map_is_larger_than_a_tile_with_what_it_sees(plain_cnn, name, monkeypatch):
    """The maps between the layers do not grow with the picture, but for those no larger than it."""
    network, largest = getattr(plain_cnn, name), {}
    source = torch.randn(1, 3, 512, 512) if name == "encoder" else torch.randn(1, 32, 128, 128)
    for number, layer in enumerate(network):
        layer.register_forward_hook(
            lambda module, inputs, output, number=number: largest.update(
                {number: max(largest.get(number, 0), output.numel())}
            )
        )
    whole = network(source)
    of_whole = largest.copy()
    largest.clear()
    pixels_of_source = 1 if name == "encoder" else 4
    assert torch.equal(run_in_tiles(network, source, pixels_of_source, 128, 4), whole)
    for number, numel in largest.items():
        assert numel <= 16 * 142**2 or of_whole[number] <= max(source.numel(), whole.numel()), number
    assert max(of_whole.values()) == 16 * 512**2


def test_what_layers_see_follows_from_the_layers():
    assert Layer(nn.Conv2d(1, 1, 3, padding=1)).source(((4, 8), (0, 4)), (16, 16)) == ((3, 9), (0, 5))
    assert Layer(nn.Conv2d(1, 1, 5, padding=4, dilation=2)).source(((6, 8), (0, 4)), (16, 7)) == ((2, 12), (0, 7))
    assert Layer(nn.Conv2d(1, 1, 2, stride=2)).source(((4, 8), (0, 4)), (16, 16)) == ((8, 16), (0, 8))
    assert Layer(nn.ConvTranspose2d(1, 1, 2, stride=2)).source(((4, 8), (1, 5)), (16, 16)) == ((2, 4), (0, 3))
    both_ways = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(1, 1, 3, padding=1))
    layer = Layer(both_ways)
    assert layer.source(((4, 8), (0, 6)), (16, 16)) == ((1, 5), (0, 4)) and layer.target(3) == 6


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile_size", [0, -4, 3, 32.0, "32", True, (32, 32)], ids=str)
def test_what_is_no_tile_size(plain_cnn, tile_size):
    for call in (plain_cnn.encode, lambda pixel_values, **kw: plain_cnn.decode(torch.zeros(1, 8, 8, 8), **kw)):
        with pytest.raises(ValueError, match="tile_size must be an integer number of pixels, at least .* 4, got"):
            call(pixels(1, 3, 32, 32), tile_size=tile_size)


def test_tiles_are_for_inference(plain_cnn):
    pixel_values = pixels(1, 3, 64, 64)
    encoded = plain_cnn.encode(pixel_values, tile_size=32)
    decoded = [plain_cnn.decode(encoded.quantized, tile_size=32), plain_cnn.decode(codes=encoded.codes, tile_size=32)]
    tensors = (encoded.latents, encoded.quantized, *(output.reconstruction for output in decoded))
    assert torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in tensors)
    with pytest.raises(ValueError, match="tiles have no gradients"):
        plain_cnn.decode(encoded.quantized.clone().requires_grad_(), tile_size=32)
    with pytest.raises(ValueError, match="tiles have no gradients"):
        plain_cnn.encode(pixel_values.clone().requires_grad_(), tile_size=32)
    with pytest.raises(ValueError, match="hidden states are whole feature maps"):
        plain_cnn.encode(pixel_values, output_hidden_states=True, tile_size=32)
    with pytest.raises(ValueError, match=r"evaluation mode: call model\.eval"):
        make_untrained().train().decode(torch.zeros(1, 8, 8, 8), tile_size=32)
    with pytest.raises(
        ValueError, match="blended: tile_size must be at least 8, 4 times the downsampling factor, got 6"
    ):
        make_untrained(vqgan_config()).encode(pixel_values, tile_size=6)
