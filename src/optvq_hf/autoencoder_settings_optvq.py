"""The settings of an autoencoder of diffusers in a configuration."""

from typing import Any


# Classes whose encoder and decoder are networks of their own: nothing stands between them and the latents.
CLASSES = ("AutoencoderTiny", "AutoencoderDC")


def check_autoencoder(backbone: str, settings: dict[str, Any] | None) -> None:
    """Raises ValueError unless the backbone "diffusers", and no other, has the settings of an autoencoder."""
    if settings is None:
        if backbone == "diffusers":
            raise ValueError('backbone="diffusers" is for models that `optvq convert --from diffusers` made')
        return
    if backbone != "diffusers":
        raise ValueError(f'autoencoder goes with backbone="diffusers", got {backbone!r}')
    if settings.get("_class_name") not in CLASSES:
        raise ValueError(
            f"autoencoder must have a _class_name of {', '.join(CLASSES)}, got {settings.get('_class_name')!r}"
        )
    widths = settings.get("encoder_block_out_channels")
    if not (isinstance(widths, list | tuple) and 0 < len(widths) <= 16):
        raise ValueError(f"autoencoder must have 1 to 16 encoder_block_out_channels, got {widths!r}")
