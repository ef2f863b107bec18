"""The encoders and decoders around the quantizer: the VQGAN's, and the paper's plain CNN for MNIST and CIFAR-10."""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_optvq import PLAIN_CNN_LATENT_CHANNELS, OptVQConfig
from .diffusers_backbone_optvq import diffusers_backbone


# ---- VQGAN backbone --------------------------------------------------------------------------------------------------


class OptVQGroupNorm(nn.GroupNorm):
    """Without torch's refusal of one number per group in one image, which is the bias then: a token may be a single pixel."""

    def forward(self, input: torch.Tensor, statistics: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Normalizes (B, C, H, W): by mean and variance of each group, (B, groups) each, if they are those of a larger map."""
        if statistics is None:
            return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        mean, variance = (
            of_groups.repeat_interleave(self.num_channels // self.num_groups, 1) for of_groups in statistics
        )
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        dtype = torch.promote_types(input.dtype, torch.float32)
        scale, shift = (of_channels.to(dtype)[..., None, None] for of_channels in (scale, shift))
        return torch.addcmul(shift, input.to(dtype), scale).to(input.dtype)


def group_norm(channels: int, num_groups: int) -> nn.GroupNorm:
    return OptVQGroupNorm(num_groups, channels, eps=1e-6)


def apply_norm(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The norm of the map at hand. Blocks take another function where that is a part of a larger map."""
    return norm(hidden_states)


def _keep(hidden_states: torch.Tensor, feature_maps: list | None) -> None:
    if feature_maps is not None:
        feature_maps.append(hidden_states)


class OptVQResnetBlock(GradientCheckpointingLayer):
    """(B, in_channels, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, num_groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = group_norm(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, hidden_states: torch.Tensor, apply_norm: Callable = apply_norm) -> torch.Tensor:
        residual = self.conv1(F.silu(apply_norm(self.norm1, hidden_states)))
        residual = self.conv2(self.dropout(F.silu(apply_norm(self.norm2, residual))))
        return self.shortcut(hidden_states) + residual


class OptVQAttentionBlock(GradientCheckpointingLayer):
    """Single-head self-attention over all positions: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = group_norm(channels, num_groups)
        self.query = nn.Conv2d(channels, channels, kernel_size=1)
        self.key = nn.Conv2d(channels, channels, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)
        self.output = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, apply_norm: Callable = apply_norm) -> torch.Tensor:
        normed = apply_norm(self.norm, hidden_states)
        query, key, value = (
            projection(normed).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, H * W, C)
            for projection in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return hidden_states + self.output(attended.squeeze(1).transpose(1, 2).reshape(hidden_states.shape))


class OptVQDownsample(nn.Module):
    """Halves height and width. Pads only the right and lower side, as in the VQGAN."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class OptVQUpsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.resize = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(self.resize(hidden_states))


class OptVQStage(nn.Module):
    """Residual blocks at one resolution, each followed by optional attention, then an optional change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        attention: bool,
        dropout: float,
        num_groups: int,
        resample: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.resnets = nn.ModuleList(OptVQResnetBlock(*pair, dropout, num_groups) for pair in zip(widths, widths[1:]))
        self.attentions = nn.ModuleList(
            OptVQAttentionBlock(out_channels, num_groups) for _ in range(num_blocks if attention else 0)
        )
        self.resample = resample(out_channels) if resample is not None else nn.Identity()

    def layers(self) -> list[nn.Module]:
        pairs = zip(self.resnets, self.attentions) if self.attentions else zip(self.resnets)
        return [*(layer for pair in pairs for layer in pair), self.resample]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers():
            hidden_states = layer(hidden_states)
        return hidden_states


class OptVQMidBlock(nn.Module):
    """Residual block, optional attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, config: OptVQConfig):
        super().__init__()
        num_groups = config.norm_num_groups
        self.resnet1 = OptVQResnetBlock(channels, channels, config.dropout, num_groups)
        has_attention = config.mid_block_add_attention
        self.attention = OptVQAttentionBlock(channels, num_groups) if has_attention else nn.Identity()
        self.resnet2 = OptVQResnetBlock(channels, channels, config.dropout, num_groups)

    def layers(self) -> list[nn.Module]:
        return [self.resnet1, self.attention, self.resnet2]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.resnet2(self.attention(self.resnet1(hidden_states)))


class OptVQEncoder(nn.Module):
    """(B, num_channels, H, W) -> (B, latent_channels, H/f, W/f), or twice the channels with `double_z`."""

    def __init__(self, config: OptVQConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multiplier]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.num_channels, config.base_channels, kernel_size=3, padding=1)
        self.stages = nn.ModuleList(
            OptVQStage(
                in_channels,
                out_channels,
                config.num_res_blocks,
                attention=config.attn_image_size // 2**level in config.attn_resolutions,
                dropout=config.dropout,
                num_groups=config.norm_num_groups,
                resample=OptVQDownsample if level < last else None,
            )
            for level, (in_channels, out_channels) in enumerate(zip([config.base_channels] + widths, widths))
        )
        self.mid = OptVQMidBlock(widths[-1], config)
        self.norm_out = group_norm(widths[-1], config.norm_num_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.encoder_channels, kernel_size=3, padding=1)

    def layers(self) -> list[nn.Module]:
        """One after the other they are the network, without anything between them."""
        stages = [layer for stage in cast(list[OptVQStage], self.stages) for layer in stage.layers()]
        return [self.conv_in, *stages, *self.mid.layers(), self.norm_out, nn.SiLU(), self.conv_out]

    def forward(self, pixel_values: torch.Tensor, feature_maps: list | None = None) -> torch.Tensor:
        """Encodes images; appends the input of the first stage and the output of every stage to `feature_maps`, if given."""
        hidden_states = self.conv_in(pixel_values)
        _keep(hidden_states, feature_maps)
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            _keep(hidden_states, feature_maps)
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden_states))))


class OptVQDecoder(nn.Module):
    """(B, latent_channels, H/f, W/f) -> (B, num_channels, H, W). Stages are listed in the order in which they run."""

    def __init__(self, config: OptVQConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in reversed(config.channel_multiplier)]
        levels = reversed(range(len(widths)))
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], kernel_size=3, padding=1)
        self.mid = OptVQMidBlock(widths[0], config)
        self.stages = nn.ModuleList(
            OptVQStage(
                in_channels,
                out_channels,
                config.num_res_blocks + 1,
                attention=config.attn_image_size // 2**level in config.attn_resolutions,
                dropout=config.dropout,
                num_groups=config.norm_num_groups,
                resample=OptVQUpsample if level > 0 else None,
            )
            for level, in_channels, out_channels in zip(levels, widths[:1] + widths, widths)
        )
        self.norm_out = group_norm(widths[-1], config.norm_num_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.num_channels, kernel_size=3, padding=1)

    def layers(self) -> list[nn.Module]:
        """One after the other they are the network, without anything between them."""
        stages = [layer for stage in cast(list[OptVQStage], self.stages) for layer in stage.layers()]
        return [self.conv_in, *self.mid.layers(), *stages, self.norm_out, nn.SiLU(), self.conv_out]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.mid(self.conv_in(hidden_states))
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


# ---- plain CNN backbone ----------------------------------------------------------------------------------------------

PLAIN_CNN_CHANNELS = 16


class OptVQPlainCNN(nn.Sequential):
    """Layers in stages that end with a ReLU. Gradient checkpointing recomputes stage by stage in the backward pass."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., torch.Tensor]  # transformers sets it when checkpointing is enabled

    def layers(self) -> list[nn.Module]:
        return list(self)

    def forward(self, hidden_states: torch.Tensor, feature_maps: list | None = None) -> torch.Tensor:
        """Runs all layers; appends the output of every ReLU to `feature_maps`, if given."""
        stage = []
        for layer in self:
            stage.append(layer)
            if isinstance(layer, nn.ReLU):
                hidden_states = self._run(stage, hidden_states)
                _keep(hidden_states, feature_maps)
                stage = []
        return self._run(stage, hidden_states)

    def _run(self, stage: list[nn.Module], hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and self.training and hidden_states.requires_grad:
            return self._gradient_checkpointing_func(nn.Sequential(*stage), hidden_states)
        for layer in stage:
            hidden_states = layer(hidden_states)
        return hidden_states


class OptVQPlainCNNEncoder(OptVQPlainCNN):
    """(B, num_channels, H, W) -> (B, 32, H/4, W/4): the paper's network for MNIST and CIFAR-10."""

    def __init__(self, config: OptVQConfig):
        width, latent = PLAIN_CNN_CHANNELS, PLAIN_CNN_LATENT_CHANNELS
        super().__init__(
            *(nn.Conv2d(config.num_channels, width, kernel_size=3, padding=1), nn.ReLU()),
            nn.Conv2d(width, width, kernel_size=2, stride=2),
            *(nn.Conv2d(width, width, kernel_size=3, padding=1), nn.ReLU()),
            nn.Conv2d(width, width, kernel_size=2, stride=2),
            *(nn.Conv2d(width, latent, kernel_size=3, padding=1), nn.ReLU()),
            nn.Conv2d(latent, latent, kernel_size=3, padding=1),
        )


class OptVQPlainCNNDecoder(OptVQPlainCNN):
    """(B, 32, H/4, W/4) -> (B, num_channels, H, W): the mirror image of the encoder."""

    def __init__(self, config: OptVQConfig):
        width, latent = PLAIN_CNN_CHANNELS, PLAIN_CNN_LATENT_CHANNELS
        super().__init__(
            *(nn.Conv2d(latent, latent, kernel_size=3, padding=1), nn.ReLU()),
            nn.ConvTranspose2d(latent, width, kernel_size=2, stride=2),
            *(nn.Conv2d(width, width, kernel_size=3, padding=1), nn.ReLU()),
            nn.ConvTranspose2d(width, width, kernel_size=2, stride=2),
            *(nn.Conv2d(width, width, kernel_size=3, padding=1), nn.ReLU()),
            nn.Conv2d(width, config.num_channels, kernel_size=3, padding=1),
        )


# Encoder and decoder by a configuration.
BACKBONES: dict[str, Callable[[OptVQConfig], tuple[nn.Module, nn.Module]]] = {
    "vqgan": lambda config: (OptVQEncoder(config), OptVQDecoder(config)),
    "plain_cnn": lambda config: (OptVQPlainCNNEncoder(config), OptVQPlainCNNDecoder(config)),
    "diffusers": diffusers_backbone,
}
