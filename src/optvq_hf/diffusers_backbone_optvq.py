"""Encoder and decoder of an autoencoder of diffusers, which is needed for such models alone."""

from typing import Any

import torch
from torch import nn

from .configuration_optvq import OptVQConfig


class OptVQDiffusersPart(nn.Module):
    """The encoder or the decoder of an autoencoder of diffusers: (B, C, H, W) -> (B, C', H', W').

    It has no feature maps to show.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, hidden_states: torch.Tensor, feature_maps: list | None = None) -> torch.Tensor:
        return self.network(hidden_states)


def diffusers_backbone(config: OptVQConfig) -> tuple[OptVQDiffusersPart, OptVQDiffusersPart]:
    """Makes encoder and decoder by the settings in `config.autoencoder`; the weights are those of the model.

    Raises:
        ImportError: If diffusers is not installed.
    """
    settings = dict(config.autoencoder or {})
    kind, of = settings.pop("_class_name"), settings.pop("id", None)
    settings.pop("revision", None)
    try:
        import diffusers
    except ImportError as error:
        of_source = f" ({of})" if of else ""
        raise ImportError(
            f"the encoder of this model is an {kind}{of_source} of diffusers, which is not installed: run pip install diffusers"
        ) from error
    autoencoder: Any = getattr(diffusers, kind)(**settings)
    return OptVQDiffusersPart(autoencoder.encoder), OptVQDiffusersPart(autoencoder.decoder)
