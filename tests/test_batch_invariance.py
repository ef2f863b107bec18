"""Latents of an image at inference on CPUs: the same bits in every batch, at every size, dtype and memory format."""

import itertools
import os
import random

import pytest
import torch

from builders import make_untrained, pixels, plain_config, vqgan_config
from grids import slow


CONFIGS = {
    "plain_cnn": plain_config(),
    "plain_cnn gray": plain_config(num_channels=1, normalize_latents=True),
    "vqgan f2": vqgan_config(),
    "vqgan f4": vqgan_config(channel_multiplier=(1, 1, 2)),
    "vqgan f4 wide": vqgan_config(channel_multiplier=(1, 2, 2), attn_resolutions=(8,)),
}


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def unaligned(images):
    return torch.cat([images.new_zeros(1), images.flatten()])[1:].view(images.shape)


def channels_last(images):
    return images.contiguous(memory_format=torch.channels_last)


FAST = list(
    itertools.product([(20, 4), (4, 28), (52, 68)], ["plain_cnn", "vqgan f2", "vqgan f4"], [1, 2], [torch.float32])
)
FAST = [(*entry, torch.contiguous_format) for entry in FAST]
WHOLE = list(
    itertools.product(
        [(20, 4), (4, 28), (52, 68), (4, 4), (36, 20), (120, 100)],
        CONFIGS,
        [1, 2, 3],
        [torch.float32, torch.bfloat16, torch.float64],
        [torch.contiguous_format, torch.channels_last],
    )
)
WHOLE = [entry for entry in WHOLE if entry[2] < 3 or entry[3] is torch.float32]
# The whole takes 8 minutes. One in 40 is tested again and again.
OTHERS = WHOLE if os.environ.get("OPTVQ_GRID") == "whole" else random.Random(0).sample(WHOLE, len(WHOLE) // 40)


@pytest.mark.parametrize(
    ("size", "name", "threads", "dtype", "weights"), [*FAST, *(slow(*entry) for entry in OTHERS)], ids=str
)
@torch.no_grad()
def test_latents_do_not_depend_on_the_batch(size, name, dtype, weights, threads, set_threads):
    set_threads(threads)
    model = make_untrained(CONFIGS[name]).to(dtype).to(memory_format=weights)
    number = 17 if model.config.backbone == "plain_cnn" else 5
    images = pixels(number, model.config.num_channels, *size, dtype=dtype)
    alone = torch.cat([model.encode(image[None], return_loss=False).latents for image in images])
    for skipped, laid_out in ((0, torch.clone), (1, channels_last), (2, unaligned), (number - 2, channels_last)):
        together = model.encode(laid_out(images[skipped:]), return_loss=False).latents
        assert torch.equal(together, alone[skipped:])


@pytest.mark.parametrize("name", ["plain_cnn", "vqgan f4"])
@torch.no_grad()
def test_feature_maps_do_not_depend_on_the_batch(name):
    model, images = make_untrained(CONFIGS[name]), pixels(5, 3, 20, 12)
    together = model.encode(images, output_hidden_states=True).hidden_states
    for number, image in enumerate(images):
        alone = model.encode(image[None], output_hidden_states=True).hidden_states
        assert all(torch.equal(one[0], all_[number]) for one, all_ in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", ["plain_cnn", "vqgan f4"])
@torch.no_grad()
def test_one_image_of_one_token_and_no_images(name):
    model = make_untrained(CONFIGS[name])
    assert model.encode(pixels(1, 3, 4, 4)).codes.shape == (1, model.config.num_codebook_heads, 1, 1)
    assert model.encode(pixels(0, 3, 8, 8)).codes.shape == (0, model.config.num_codebook_heads, 2, 2)


@pytest.mark.parametrize("name", ["plain_cnn", "vqgan f4"])
def test_gradients_at_inference(name):
    """To the pixels, and to feature maps, which are then those of the whole batch."""
    model, images = make_untrained(CONFIGS[name]), pixels(3, 3, 8, 8).requires_grad_()
    latents = model.encode(images).latents
    [gradient] = torch.autograd.grad(latents.square().sum(), images)
    output = model.encode(images, output_hidden_states=True)
    torch.testing.assert_close(output.latents, latents, rtol=1e-4, atol=1e-5)
    whole, to_map = torch.autograd.grad(output.latents.square().sum(), [images, output.hidden_states[-1]])
    torch.testing.assert_close(gradient, whole, rtol=1e-3, atol=1e-5)
    assert to_map.abs().sum() > 0
