"""Configuration of OptVQ: all settings of the model, none of a training run."""

import inspect
import logging
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal

from huggingface_hub.dataclasses import strict, type_validator
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import PreTrainedConfig

from .autoencoder_settings_optvq import check_autoencoder
from .configuration_fields_optvq import MOST_BLOCKS, MOST_CHANNELS, OptVQFields


logger = logging.getLogger(__name__)

PLAIN_CNN_LATENT_CHANNELS = 32

# Fields of a model's configuration that may change, besides `image_size`, with the quantizer's name of each.
CHANGEABLE_FIELDS = {
    "training_assignment": "training_assignment",
    "inference_assignment": "inference_assignment",
    "sinkhorn_epsilon": "epsilon",
    "sinkhorn_iterations": "iterations",
    "sinkhorn_balance": "balance",
    "sinkhorn_warm_start": "warm_start",
    "cost": "cost",
    "cost_normalization": "normalization",
    "gradient_estimator": "gradient_estimator",
    "codebook_ema_decay": "ema_decay",
    "codebook_loss_type": "loss_type",
    "commitment_loss_weight": "commitment_weight",
    "codebook_loss_weight": "codebook_weight",
}
Dtype = Literal["float16", "bfloat16", "float32", "float64"] | None
# Entries of config.json and arguments of transformers that are not fields of PreTrainedConfig, with their types in the file.
OTHER_ENTRIES = {
    "attn_implementation": str | dict | None,
    "auto_map": dict[str, str],
    "custom_pipelines": dict[str, dict],
    "_name_or_path": str,
    "name_or_path": str,
    "output_attentions": bool | None,
    "quantization_config": dict | None,
    "torch_dtype": Dtype,
    "use_cache": bool | None,
}
# Types of all entries that are not fields of OptVQConfig.
ENTRY_TYPES = {
    "architectures": list[str] | None,
    "chunk_size_feed_forward": int,
    "id2label": dict | None,
    "is_encoder_decoder": bool,
    "label2id": dict | None,
    "output_hidden_states": bool | None,
    "problem_type": str | None,
    "return_dict": bool | None,
    "transformers_version": str | None,
    **OTHER_ENTRIES,
    "dtype": Dtype,
    "model_type": str,
    "training_schedules": dict[str, list[float | int]] | None,
    "converted_from": dict[str, str | None] | None,
}


def _check_entry(name: str, value: Any) -> None:
    """Raises ValueError for an entry of config.json that has the right type, and cannot be used."""
    if name == "return_dict" and value is False:
        raise ValueError("return_dict must be true: the outputs of the model have names")
    if name == "training_schedules" and any(len(pair) != 2 for pair in (value or {}).values()):
        raise ValueError(f"training_schedules must have two values each, the first and the last, got {value}")


@strict
class OptVQConfig(OptVQFields, PreTrainedConfig):
    """Configuration of an [`OptVQModel`].

    The defaults are the ImageNet 256x256 model of the OptVQ paper (arXiv 2412.15195): a VQGAN encoder and decoder with
    downsampling factor 16, and 16,384 codes shared by 4 heads. A wrong value or an unknown field raises a
    `StrictDataclassError`.

    The layers of a model follow from these fields alone. The configuration of a model, `model.config`, may change in its
    `image_size` and in what the quantizer reads (assignment, transport, loss weights: [`CHANGEABLE_FIELDS`]): that acts at
    once. A change of any other field is an error, when the model is used or saved.

    Attributes:
        training_schedules: First and last value of every field that followed a schedule in `optvq train`; it holds the last.
        converted_from: Source and licence of the converted weights that the model's training began with.
    """

    model_type = "optvq"
    # Records, not settings. Their types are in comments, because an annotation would make them fields.
    training_schedules = None  # type: dict[str, list[float]] | None
    converted_from = None  # type: dict[str, str | None] | None
    # `transformers.Trainer` gives `compute_metrics` the rest of the output: reconstruction and codes.
    keys_to_ignore_at_inference = [  # a list: transformers adds to it
        "quantized", "latents", "perplexity", "hidden_states", "quantizer_loss", "code_counts", "marginal_error",
    ]  # fmt: skip

    def __post_init__(self, **kwargs: Any) -> None:
        """Takes what transformers saves besides the fields. Anything else is an error."""
        for name in kwargs:
            self._check_name(name, likeness=0.6, may_be_other=False)
        super().__post_init__(**kwargs)
        if self.attn_image_size is None:
            self.attn_image_size = self.image_size

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in transformers; an entry or a keyword that looks like a mistyped field is an error.

        Other entries that are not fields were set by another library before saving. They are kept, with a warning.
        """
        cls._check_entries(config_dict)
        others = {name: value for name, value in config_dict.items() if not cls._is_known(name)}
        for name in others:
            cls._check_name(name)
        if others:
            logger.warning("config.json has entries that are not fields of OptVQConfig: %s", ", ".join(sorted(others)))
        config_dict = {name: value for name, value in config_dict.items() if name not in others}
        loaded: Any = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        config, unused = loaded  # transformers annotates the configuration alone
        for name, value in others.items():
            setattr(config, name, value)
        for name in unused:  # a keyword that is not for the configuration may be for the model
            cls._check_name(name, likeness=0.85 if return_unused_kwargs else 0.6, may_be_other=return_unused_kwargs)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def _check_entries(cls, config_dict: dict[str, Any]) -> None:
        """Raises an error for an entry that would replace a part of the class, or has a type that transformers lets pass."""
        of_the_file = {entry.name for entry in fields(cls)}  # without class variables
        for name, value in config_dict.items():
            try:
                if name in ENTRY_TYPES:
                    type_validator(name, value, ENTRY_TYPES[name])
                    _check_entry(name, value)
                elif hasattr(cls, name) and name not in of_the_file:
                    raise ValueError(f"OptVQConfig has no field {name!r}")
            except (TypeError, ValueError) as error:
                raise StrictDataclassClassValidationError(validator="entries", cause=error) from error

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a field, or an attribute of another library; one that looks like a mistyped field is an error."""
        self._check_name(name)
        super().__setattr__(name, value)

    @classmethod
    def _is_known(cls, name: str) -> bool:
        return not cls._is_of_the_class(name) and (
            name.startswith("_") or name in OTHER_ENTRIES or hasattr(cls, name) or name in cls.__dataclass_fields__
        )

    @classmethod
    def _is_of_the_class(cls, name: str) -> bool:
        return name.startswith("__") or callable(getattr(cls, name, None))

    @classmethod
    def _check_name(cls, name: str, likeness: float = 0.85, may_be_other: bool = True) -> None:
        """Raises an error for a name that is not known, with the field that is most like it.

        Args:
            likeness: How much a name must be like a field, from 0 to 1, to be taken for it.
            may_be_other: Whether a name that is like no field is taken.
        """
        if cls._is_known(name):
            return
        nearest = get_close_matches(name, cls.__dataclass_fields__, n=1, cutoff=likeness)
        if nearest or not may_be_other or cls._is_of_the_class(name):
            hint = f", did you mean {nearest[0]!r}?" if nearest else ""
            error = ValueError(f"OptVQConfig has no field {name!r}{hint}")
            raise StrictDataclassClassValidationError(validator="fields", cause=error)

    def validate_architecture(self) -> None:
        """Checks that fields fit together; transformers' base class calls it after init and before saving."""
        super().validate_architecture()
        if self.codebook_dim % self.num_codebook_heads:
            raise ValueError(
                f"codebook_dim must be divisible by num_codebook_heads, got {self.codebook_dim} and {self.num_codebook_heads}"
            )
        if self.codebook_update == "ema" and self.use_codebook_projection:
            raise ValueError('codebook_update="ema" moves the embedding itself: it needs use_codebook_projection=False')
        if not self.use_quant_conv and self.backbone_channels != self.codebook_dim:
            raise ValueError(
                "without quant_conv, codebook_dim must be the number of the backbone's latent channels, "
                f"got {self.codebook_dim} and {self.backbone_channels}"
            )
        check_autoencoder(self.backbone, self.autoencoder)
        if self.double_z and (self.backbone != "vqgan" or not self.use_quant_conv):
            raise ValueError('double_z needs backbone="vqgan" and use_quant_conv=True, which reads all its channels')
        if self.attn_image_size is not None and self.attn_image_size < 1:
            raise ValueError(f"attn_image_size must be greater than 0, got {self.attn_image_size}")
        if not self.channel_multiplier or min(self.channel_multiplier) < 1:
            raise ValueError(f"channel_multiplier must hold positive integers, got {self.channel_multiplier}")
        if len(self.channel_multiplier) > 16 or max(self.channel_multiplier) * self.base_channels > MOST_CHANNELS:
            raise ValueError(
                f"channel_multiplier may have at most 16 resolutions, and a layer at most {MOST_CHANNELS:,} channels, got "
                f"{self.channel_multiplier} with base_channels {self.base_channels}"
            )
        if self.num_res_blocks * len(self.channel_multiplier) > MOST_BLOCKS:
            raise ValueError(
                f"a model may have at most {MOST_BLOCKS} residual blocks, got num_res_blocks {self.num_res_blocks} at "
                f"{len(self.channel_multiplier)} resolutions"
            )
        if self.image_size % self.downsample_factor:
            raise ValueError(
                f"image_size must be divisible by the downsampling factor {self.downsample_factor}, got {self.image_size}"
            )
        if self.backbone == "vqgan" and self.base_channels % self.norm_num_groups:
            raise ValueError(
                f"base_channels must be a multiple of {self.norm_num_groups} (norm_num_groups), got {self.base_channels}"
            )

    @property
    def fixed_fields(self) -> dict[str, Any]:
        """The fields, with their values, that may not change once a model is made: they decide its layers, or act only then."""
        values = {name: value for name, value in vars(self).items() if name in FIXED_FIELDS}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    @property
    def downsample_factor(self) -> int:
        """Pixels per token along each axis (f)."""
        widths = (self.autoencoder or {}).get("encoder_block_out_channels", self.channel_multiplier)
        return 4 if self.backbone == "plain_cnn" else 2 ** (len(widths) - 1)

    @property
    def backbone_channels(self) -> int:
        """Input channels of the decoder, and output channels of the encoder without `double_z`."""
        return PLAIN_CNN_LATENT_CHANNELS if self.backbone == "plain_cnn" else self.latent_channels

    @property
    def encoder_channels(self) -> int:
        """Output channels of the encoder."""
        return self.backbone_channels * (2 if self.double_z else 1)

    @property
    def head_dim(self) -> int:
        """Width of one head's feature and of one code vector."""
        return self.codebook_dim // self.num_codebook_heads

    @property
    def latent_size(self) -> int:
        """Height and width of the token grid of an `image_size` x `image_size` image."""
        return self.image_size // self.downsample_factor

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an `image_size` x `image_size` image; each has `codes_per_token` codes."""
        return self.latent_size**2

    @property
    def codes_per_token(self) -> int:
        """Codes of a token, one for each head of each level."""
        return self.num_quantizers * self.num_codebook_heads

    @property
    def vocab_size(self) -> int:
        """Number of ids that [`~modeling_optvq.OptVQModel.to_token_ids`] uses."""
        return self.codes_per_token * self.codebook_size


# All fields of a model's configuration that may not change.
FIXED_FIELDS = OptVQFields.__dataclass_fields__.keys() - CHANGEABLE_FIELDS.keys() - {"image_size"}

# The class tells what its fields are for, too.
_, *_OF_FIELDS = (inspect.getdoc(OptVQFields) or "").partition("Args:")
OptVQConfig.__doc__ = "\n\n".join([inspect.getdoc(OptVQConfig) or "", "".join(_OF_FIELDS)])

OptVQConfig.register_for_auto_class()
