"""The card of a converted model: where it comes from, its licence, its settings."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..modeling_optvq import OptVQModel


TEMPLATE = Path(__file__).parent / "converted_model_card.md"

# What the card says of the model, in this order.
SETTINGS = (
    "backbone", "image_size", "num_channels", "downsample_factor", "codebook_size", "codebook_dim", "num_codebook_heads",
    "use_codebook_projection", "use_quant_conv", "training_assignment", "inference_assignment", "sinkhorn_epsilon",
    "sinkhorn_iterations", "cost_normalization", "codebook_loss_type", "codebook_loss_weight",
)  # fmt: skip


def converted_model_card(
    model: OptVQModel,
    source: str,
    name: str,
    license: str,
    *,
    is_hub_id: bool,
    had_discriminator: bool,
    has_discriminator: bool,
    notes: tuple[str, ...] = (),
) -> ModelCard:
    """Card of a converted model.

    Args:
        model: The converted model.
        source: Hub id, or name of the folder or file it came from.
        name: Of the converted model.
        license: Licence of the weights.
        is_hub_id: Whether `source` is one.
        had_discriminator, has_discriminator: Whether the source had a discriminator, and whether it was kept.
        notes: Lines about settings that have no place in the configuration.
    """
    config = model.config
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["optvq", "image-tokenizer", "vector-quantization", "optimal-transport"],
        base_model=source if is_hub_id else None,
    )
    settings = {field: getattr(config, field) for field in SETTINGS}
    was_transport = config.training_assignment != "nearest"
    if not was_transport:
        settings = {key: value for key, value in settings.items() if not key.startswith(("sinkhorn", "cost"))}
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        location=name,
        config=config,
        settings={key: f"`{value}`" for key, value in settings.items()},
        notes=notes,
        source_link=f"[{source}](https://huggingface.co/{source})" if is_hub_id else f"`{source}`",
        license=license,
        num_parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        was_transport=was_transport,
        had_discriminator=had_discriminator,
        has_discriminator=has_discriminator,
    )
