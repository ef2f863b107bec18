"""The quantizer of a model, whose settings are those of the model's configuration."""

from typing import Any

from .configuration_optvq import CHANGEABLE_FIELDS, OptVQConfig
from .quantizer_optvq import OptVQQuantizer


class OptVQModelQuantizer(OptVQQuantizer):
    """The quantizer of a model. What may change after construction is one value, in the model's configuration.

    So `model.config.sinkhorn_epsilon` and `model.quantizer.epsilon` are the same, and what is set under one name is read under
    the other, and saved.

    Args:
        config: The configuration of the model; read at every use.
    """

    def __init__(self, config: OptVQConfig):
        self.__dict__["config"] = config  # before anything that the properties below read
        super().__init__(
            codebook_size=config.codebook_size,
            dim=config.codebook_dim,
            num_heads=config.num_codebook_heads,
            use_projection=config.use_codebook_projection,
            freeze_codebook=config.freeze_codebook,
            codebook_update=config.codebook_update,
            **{attribute: getattr(config, field) for field, attribute in CHANGEABLE_FIELDS.items()},
        )


def _field_of_config(field: str) -> property:
    def get(quantizer: OptVQModelQuantizer) -> Any:
        return getattr(quantizer.config, field)

    def change(quantizer: OptVQModelQuantizer, value: Any) -> None:
        setattr(quantizer.config, field, value)

    return property(get, change)


for field, attribute in CHANGEABLE_FIELDS.items():
    setattr(OptVQModelQuantizer, attribute, _field_of_config(field))
