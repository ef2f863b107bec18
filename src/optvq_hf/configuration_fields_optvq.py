"""The fields of OptVQConfig: names, types, defaults, ranges and what each is for. The command line reads them without torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import validated_field


# Side of an image in pixels; channels of a layer, and width of codes; codes, whose numbers are int32 in files; rounds; residual
# blocks and levels: a wrong number in a file must not build modules until the memory is full.
MOST_PIXELS, MOST_CHANNELS, MOST_CODES, MOST_ROUNDS = 2**16, 2**16, 2**31 - 1, 10**6
MOST_BLOCKS = MOST_LEVELS = 1000


def _positive(value: float) -> None:
    if not value > 0:
        raise ValueError(f"must be greater than 0, got {value}")


def _non_negative(value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"must be 0 or greater, got {value}")


def _positive_finite(value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"must be finite and greater than 0, got {value}")


def _at_most(largest: int) -> Callable[[int], None]:
    """A check for numbers in files and flags with which no model can be meant: torch would overflow, in obscure words."""

    def check(value: int) -> None:
        if value > largest:
            raise ValueError(f"must be at most {largest:,}, got {value}")

    return check


def _fraction(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"must lie in [0, 1], got {value}")


def _below_one(value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"must lie in [0, 1), got {value}")


@dataclass(kw_only=True, repr=False, eq=False)
class OptVQFields:
    """The settings of a model, one field each.

    Args:
        image_size: Height and width of the training images in pixels. The model accepts other sizes too.
        num_channels: 3 for RGB, 1 for grayscale.
        backbone: `"vqgan"` (residual blocks and attention), `"plain_cnn"`, the paper's network for MNIST and CIFAR-10
            (f = 4, 32 latent channels), or `"diffusers"`; the last two ignore the fields for widths and blocks.
        autoencoder: With `backbone="diffusers"`: its class (`_class_name`), settings, `id` and `revision`.
        base_channels: Channels at full resolution; a multiple of `norm_num_groups`.
        channel_multiplier: Channels at each resolution, as multiples of `base_channels`. Every entry after the first
            halves the resolution.
        num_res_blocks: Residual blocks per resolution in the encoder; the decoder has one more.
        attn_resolutions: Sizes of feature maps (for images of `attn_image_size`) that get self-attention after each residual
            block.
        attn_image_size: Size of images that `attn_resolutions` refers to. By default the `image_size` of a new configuration.
            It is saved, so that a model that is loaded with another `image_size` has the same layers.
        mid_block_add_attention: Use self-attention between the two residual blocks at the lowest resolution.
        norm_num_groups: Groups of every group norm.
        dropout: Dropout probability inside the residual blocks.
        latent_channels: Channels between the backbone and the 1x1 convolutions around the quantizer.
        double_z: The encoder gives twice these channels, as that of a VAE, and the convolution before the quantizer reads all.
        use_quant_conv: Use these 1x1 convolutions; without them, the backbone's channels are quantized directly.
        normalize_latents: Scale the latents of every token to length 1, as LlamaGen does, before they are quantized.
        codebook_size: Number of codes K.
        codebook_dim: Width D of a token, cut into `num_codebook_heads` contiguous chunks.
        num_codebook_heads: Heads B per token. All share one codebook, so a token has K^B possible values.
        num_quantizers: Levels of residual quantization, each with a codebook of its own: every level quantizes what the ones
            before it have left.
        use_codebook_projection: Use `Linear(embedding)` as the codebook, so that every code moves in every training step.
        freeze_codebook: Train neither the embedding nor its projection.
        codebook_update: How codes learn: by `"gradient"` of the codebook loss (the paper), or as an EMA codebook (`"ema"`), in
            which every code is the moving average of the features assigned to it. `"ema"` needs
            `use_codebook_projection=False`.
        codebook_ema_decay: Decay of the EMA codebook per step.
        training_assignment: How features are assigned to codes in training. `"sinkhorn"` is the paper's optimal transport,
            `"sample"` draws from the transport plan, `"soft"` averages code vectors with it, `"nearest"` is ordinary VQ.
        inference_assignment: How features are assigned to codes at inference. With `"nearest"` and `"potentials"` (balanced, by
            potentials averaged in training) the codes of an image do not depend on its batch; with `"sinkhorn"` they do.
        sinkhorn_epsilon: Inverse of the entropic regularisation strength. Larger is closer to unregularised transport.
        sinkhorn_iterations: Rounds of Sinkhorn-Knopp.
        sinkhorn_balance: Strength in [0, 1] of the push towards even use of the codes; 0 is nearest-neighbour assignment.
        sinkhorn_warm_start: Start every training step's rounds at the potentials of the previous step. Fewer rounds then reach
            the same marginal error.
        cost: What makes a code near: `"euclidean"` distance (the paper's), `"squared_euclidean"`, or `"cosine"`, 1 - cos.
        cost_normalization: Scale of the distances before the exponential: `"zscore"` divides by the standard deviation of
            all distances of the batch, `"robust"` by a spread that outliers cannot inflate (their median absolute
            deviation), `"sqrt_dim"` by the square root of the head's width, `"none"` does not scale.
        gradient_estimator: How the decoder's gradient passes the quantizer: `"straight_through"` (the paper), unchanged, or by
            `"rotation"` (Fifty et al. 2024).
        codebook_loss_type: `"l2"`, `"l1"`, or `"cross_entropy"` of the assigned codes given the distances (without weights).
        commitment_loss_weight: Weight of the loss term that moves features to their codes.
        codebook_loss_weight: Weight of the loss term that moves codes to their features (`beta` in the paper).
    """

    image_size: int = validated_field([_positive, _at_most(MOST_PIXELS)], default=256)
    num_channels: int = validated_field([_positive, _at_most(MOST_CHANNELS)], default=3)
    backbone: Literal["vqgan", "plain_cnn", "diffusers"] = "vqgan"
    autoencoder: dict | None = None
    base_channels: int = validated_field([_positive, _at_most(MOST_CHANNELS)], default=128)
    channel_multiplier: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = validated_field([_positive], default=2)
    attn_resolutions: list[int] | tuple[int, ...] = (16,)
    attn_image_size: int | None = None
    mid_block_add_attention: bool = True
    norm_num_groups: int = validated_field([_positive, _at_most(MOST_CHANNELS)], default=32)
    dropout: float | int = validated_field([_fraction], default=0.0)
    latent_channels: int = validated_field([_positive, _at_most(MOST_CHANNELS)], default=256)
    double_z: bool = False
    use_quant_conv: bool = True
    normalize_latents: bool = False

    codebook_size: int = validated_field([_positive, _at_most(MOST_CODES)], default=16384)
    codebook_dim: int = validated_field([_positive, _at_most(MOST_CHANNELS)], default=256)
    num_codebook_heads: int = validated_field([_positive, _at_most(MOST_CHANNELS)], default=4)
    num_quantizers: int = validated_field([_positive, _at_most(MOST_LEVELS)], default=1)
    use_codebook_projection: bool = True
    freeze_codebook: bool = False
    codebook_update: Literal["gradient", "ema"] = "gradient"
    codebook_ema_decay: float | int = validated_field([_below_one], default=0.99)

    training_assignment: Literal["sinkhorn", "nearest", "sample", "soft"] = "sinkhorn"
    inference_assignment: Literal["nearest", "sinkhorn", "potentials"] = "nearest"
    sinkhorn_epsilon: float | int = validated_field([_positive_finite], default=10.0)
    sinkhorn_iterations: int = validated_field([_positive, _at_most(MOST_ROUNDS)], default=5)
    sinkhorn_balance: float | int = validated_field([_fraction], default=1.0)
    sinkhorn_warm_start: bool = False
    cost: Literal["euclidean", "squared_euclidean", "cosine"] = "euclidean"
    cost_normalization: Literal["zscore", "robust", "sqrt_dim", "none"] = "zscore"
    gradient_estimator: Literal["straight_through", "rotation"] = "straight_through"

    codebook_loss_type: Literal["l2", "l1", "cross_entropy"] = "l2"
    commitment_loss_weight: float | int = validated_field([_non_negative], default=1.0)
    codebook_loss_weight: float | int = validated_field([_non_negative], default=0.25)
