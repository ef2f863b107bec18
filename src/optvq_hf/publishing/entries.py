"""The entries of every published record: a closed list. Whatever else a file holds, a token or a note, is not published."""

from dataclasses import fields
from typing import Any, get_type_hints

from ..configuration_fields_optvq import OptVQFields
from ..configuration_optvq import ENTRY_TYPES
from ..data.arguments import DataArguments
from ..evaluation.arguments import EVALUATED_ASSIGNMENTS
from ..evaluation.protocols import METRICS
from ..evaluation.results import COLUMNS, METRICS_FILE
from ..image_processing_optvq import OptVQImageProcessorKwargs
from ..training.arguments import Recipe
from ..training.digests import DIGEST, EMA_OF
from ..training.models import CONVERSION_FILE, OF_SOURCE
from ..training.watching.alarms import ALARMS
from ..training.watching.log import LOG_FILE, RECIPE_FILE, SUMMARY_FILE


CONFIG_FILE, PROCESSOR_FILE = "config.json", "preprocessor_config.json"
# Flags that say where a run was on its machine, or how its owner's accounts are called.
NOT_PUBLIC = {"output_dir", "push_to_hub", "tracker_project"}
# Entries of config.json that name a place.
PLACES = {"_name_or_path", "name_or_path"}


def _plain(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


_FIELDS = OptVQFields.__dataclass_fields__.keys()
_FLAGS = {entry.name for one in (*get_type_hints(Recipe).values(), DataArguments) for entry in fields(one)}
_PER_LEVEL = tuple(f"{name}_per_level" for name in ("mse", "psnr", "codebook_usage", "perplexity"))
# Frechet distances of other networks have names that may be folders.
_METRICS = _plain(*(name for name in METRICS if ":" not in name))
_FIGURES: dict[str, Any] = {
    **_plain("num_images", "codebook_usage_per_head", "perplexity_per_head", *_PER_LEVEL, *COLUMNS, *_METRICS),
    **_plain("entropy", "entropy_per_head", "token_entropy", "bits_per_token", "entropy_bits_per_token"),
    **_plain("bits_per_pixel", "entropy_bits_per_pixel"),
    "intervals": _METRICS,
}
_VERSIONS = {"versions": _plain("torch", "transformers")}
_CODE = _plain("AutoConfig", "AutoModel", "AutoModelForImageToImage", "AutoImageProcessor")
_PIPELINE = {"impl": None, "pt": None, "type": None}
_OF_ALARMS = _plain(*(alarm.name for alarm in ALARMS))
# Entries of each record: None for a plain value or a list of plain values, a dict for one with these entries.
ENTRIES: dict[str, dict[str, Any]] = {
    METRICS_FILE: {
        **_plain(
            "model", "model_revision", DIGEST, "dataset", "dataset_id", "dataset_config", "data_dir", "image_column"
        ),
        **_plain(
            "split", "train_split", "eval_fraction", "eval_fraction_seed", "max_images", "sample", "num_unreadable"
        ),
        **_plain(
            "protocol",
            "image_size",
            "batch_size",
            "tile_size",
            "dtype",
            "images_sha256",
            "settings_sha256",
            "assignment",
        ),
        **_FIGURES,
        "conventions": _METRICS,
        "by_assignment": dict.fromkeys(EVALUATED_ASSIGNMENTS, _FIGURES),
        **_VERSIONS,
    },
    RECIPE_FILE: _plain(*(_FLAGS | _FIELDS) - NOT_PUBLIC),
    SUMMARY_FILE: {
        **_plain(
            "dataset", "dataset_id", "base_model_id", "steps", "images_per_step", "seconds", "device", "processes"
        ),
        **_plain(DIGEST, EMA_OF),
        "alarms": _OF_ALARMS,
        **_VERSIONS,
    },
    LOG_FILE: {
        **_plain("step", "alarms", DIGEST),
        **_plain("loss", "l1", "l2", "quantizer", "quantizer_share", "perceptual", "generator", "adaptive_weight"),
        **_plain("discriminator", "logits_real", "logits_fake", "lecam", "r1"),
        **_plain("gradient_norm", "discriminator_gradient_norm", "learning_rate", "discriminator_learning_rate"),
        **_plain("psnr", "codebook_usage", "expected_usage", "perplexity", "dead_codes", "oldest_code"),
        **_plain("nearest_disagreement", "marginal_error", "latent_norm", "codebook_norm", "codebook_offset"),
        **_plain("codebook_distance", "nonfinite_steps", "unreadable_images", "images_per_second", "data_wait"),
        **_plain("peak_memory"),
    },
    CONVERSION_FILE: _plain(*OF_SOURCE, "notes", "left_out", "has_discriminator", DIGEST),
    CONFIG_FILE: {
        **_plain(*(_FIELDS | ENTRY_TYPES.keys()) - PLACES - {"id2label", "label2id", "quantization_config"}),
        "auto_map": _CODE,
        "custom_pipelines": dict.fromkeys(("image-tokenization", "image-reconstruction"), _PIPELINE),
        "training_schedules": _plain("sinkhorn_epsilon", "sinkhorn_balance"),
        "converted_from": _plain(*OF_SOURCE),
    },
    PROCESSOR_FILE: {
        **_plain(*OptVQImageProcessorKwargs.__annotations__, "image_processor_type"),
        **dict.fromkeys(("size", "crop_size"), _plain("height", "width", "shortest_edge", "longest_edge")),
        "auto_map": _CODE,
    },
}


def known_entries(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """The entries of the record in a file of this name that this package writes; others are dropped."""
    return _known(ENTRIES[name], record)


def _known(entries: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name in (name for name in record if name in entries):
        value, of_value = record[name], entries[name]
        if isinstance(value, dict) and of_value is not None:
            found[name] = _known(of_value, value)
        elif _is_plain(value):
            found[name] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(entry) and not isinstance(entry, (list, tuple)) for entry in value)
    return value is None or isinstance(value, (str, int, float))
