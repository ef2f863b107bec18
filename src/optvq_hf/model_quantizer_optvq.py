"""The quantizer of a model, whose settings are those of the model's configuration."""

from typing import Any

from .configuration_optvq import CHANGEABLE_FIELDS, OptVQConfig
from .quantizer_optvq import OptVQQuantizer
from .residual_optvq import ResidualLevels


class OptVQModelQuantizer(OptVQQuantizer):
    """The quantizer of a model, or one of its levels. What may change after construction is one value, in the configuration.

    So `model.config.sinkhorn_epsilon` and `model.quantizer.epsilon` are the same, and what is set under one name is read under
    the other, and saved.

    Args:
        config: The configuration of the model; read at every use.
    """

    def __init__(self, config: OptVQConfig):
        self.bind(config)  # before anything that the properties below read
        super().__init__(
            codebook_size=config.codebook_size,
            dim=config.codebook_dim,
            num_heads=config.num_codebook_heads,
            use_projection=config.use_codebook_projection,
            freeze_codebook=config.freeze_codebook,
            codebook_update=config.codebook_update,
            **{attribute: getattr(config, field) for field, attribute in CHANGEABLE_FIELDS.items()},
        )

    def bind(self, config: OptVQConfig) -> None:
        """Reads this configuration from now on."""
        self.__dict__["config"] = config


class OptVQModelResidualQuantizer(ResidualLevels):
    """The quantizer of a model with `config.num_quantizers` levels; otherwise as [`OptVQModelQuantizer`]."""

    def __init__(self, config: OptVQConfig):
        super().__init__(OptVQModelQuantizer(config) for _ in range(config.num_quantizers))
        self.bind(config)

    def bind(self, config: OptVQConfig) -> None:
        """Reads this configuration from now on, in all levels."""
        self.__dict__["config"] = config
        for level in self.levels:
            level.bind(config)


MODEL_QUANTIZERS = (OptVQModelQuantizer, OptVQModelResidualQuantizer)


def make_quantizer(config: OptVQConfig) -> OptVQModelQuantizer | OptVQModelResidualQuantizer:
    """With one level the names of weights have no level in them: those of models from before there were levels."""
    return OptVQModelQuantizer(config) if config.num_quantizers == 1 else OptVQModelResidualQuantizer(config)


def _field_of_config(field: str) -> property:
    def get(quantizer: Any) -> Any:
        return getattr(quantizer.config, field)

    def change(quantizer: Any, value: Any) -> None:
        setattr(quantizer.config, field, value)

    return property(get, change)


for field, attribute in CHANGEABLE_FIELDS.items():
    for kind in MODEL_QUANTIZERS:
        setattr(kind, attribute, _field_of_config(field))
