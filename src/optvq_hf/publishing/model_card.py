"""The card of a converted model: where it comes from, its licence, its settings."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..modeling_optvq import OptVQModel
from .conversion import DISCRIMINATOR, PERCEPTUAL_NETWORK, training_notes
from .reference_files import ReferenceFiles


TEMPLATE = Path(__file__).parent / "converted_model_card.md"

# What the card says of the model, in this order.
SETTINGS = (
    "backbone", "image_size", "num_channels", "base_channels", "channel_multiplier", "num_res_blocks", "attn_resolutions",
    "downsample_factor", "latent_channels", "codebook_size", "codebook_dim", "num_codebook_heads", "use_codebook_projection",
    "freeze_codebook", "use_quant_conv", "training_assignment", "inference_assignment", "sinkhorn_epsilon",
    "sinkhorn_iterations", "cost_normalization", "codebook_loss_type", "commitment_loss_weight", "codebook_loss_weight",
)  # fmt: skip
OF_THE_VQGAN = ("base_channels", "channel_multiplier", "num_res_blocks", "attn_resolutions", "latent_channels")
OF_THE_TRANSPORT = ("sinkhorn_epsilon", "sinkhorn_iterations", "cost_normalization")


def converted_model_card(
    model: OptVQModel, reference: ReferenceFiles, name: str, license: str, has_discriminator: bool
) -> ModelCard:
    """Card of a converted model.

    Args:
        model: The converted model.
        reference: What it was converted from.
        name: Of the converted model.
        license: Licence of the weights.
        has_discriminator: Whether the source's discriminator was kept.
    """
    config, source, revision = model.config, reference.source, reference.revision
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["optvq", "image-tokenizer", "vector-quantization", "optimal-transport"],
        base_model=source if revision else None,
    )
    is_transport = config.training_assignment != "nearest"
    hidden = () if config.backbone == "vqgan" else OF_THE_VQGAN
    hidden += () if is_transport else OF_THE_TRANSPORT
    parts = (("the perceptual network", PERCEPTUAL_NETWORK), ("the discriminator", DISCRIMINATOR))
    left_out = [
        part
        for part, prefix in parts
        if any(weight.startswith(prefix) for weight in reference.weights)
        and not (prefix == DISCRIMINATOR and has_discriminator)
    ]
    link = f"[{source}](https://huggingface.co/{source}), revision `{revision}`" if revision else f"`{_name(source)}`"
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        config=config,
        settings={field: f"`{getattr(config, field)}`" for field in SETTINGS if field not in hidden},
        notes=training_notes(reference.config),
        source_link=link,
        license=license,
        num_parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        is_transport=is_transport,
        is_sampling=config.training_assignment == "sample",
        left_out=left_out,
        has_discriminator=has_discriminator,
    )


def _name(source: str) -> str:
    return Path(source).resolve().name
