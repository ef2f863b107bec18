"""The dataset card of a folder of tokens."""

from typing import Any

from huggingface_hub import DatasetCardData

from ..training.digests import DIGEST
from .manifest import DATA_FOLDER


TEXT = """---
{data}
---

# Images as {title}

The images of {datasets} as {what} of the visual tokenizer {model}{revision}, made by `optvq tokenize` (optvq_hf {version}).

| split | of the source | images | rows | not readable |
| - | - | - | - | - |
{splits}

Every row has

{columns}

{meaning} this model alone: the weights with the SHA-256 `{digest}`.

```python
from datasets import load_dataset
from optvq_hf.tokenization import load_tokens

tokens = load_dataset("{repository}", split="{split}")  # as it is, also with streaming=True
tokens = load_tokens("{repository}", model="{model_id}", split="{split}"{option})  # checked: shards and model
```

{use}
`manifest.json` has the configuration, the preprocessing, the source and the SHA-256 of every shard.
"""
# What differs between a folder of codes and one of latents.
OF_CODES = {
    "title": "tokens",
    "what": "the codes",
    "meaning": "Codes mean pictures for",
    "option": "",
    "use": "`optvq detokenize --tokens {repository} --output-dir pictures{options}` makes pictures of them.",
}
OF_LATENTS = {
    "title": "latents",
    "what": "what the encoder gives, before quantization,",
    "meaning": "They are of the encoder of",
    "option": ", latents=True",
    "use": "`optvq train --model {model_id} --latents {repository} ...` trains its quantizer.",
}
MEANINGS = {
    "index": "row of the image in that part of the source, counted from 0",
    "codes": "{dtype}, {shape}: heads, and height and width of the grid of tokens; each in [0, {codebook_size})",
    "latents": "{dtype}, {shape}: channels, height and width of what the encoder gives, for `optvq train --latents`",
    "crop": "0 for the centre crop, otherwise the number of a random crop",
    "flipped": "whether the image was mirrored",
}


def make_card(manifest: dict[str, Any], repository: str = "FOLDER") -> str:
    """The card as Markdown.

    Args:
        manifest: Of the folder.
        repository: Hub id, if it is published.
    """
    splits, model = manifest["splits"], manifest["model"]
    first = next(iter(splits.values()))
    kind, words = ("codes", OF_CODES) if "codes" in first else ("latents", OF_LATENTS)
    facts = {**first[kind], "codebook_size": model["config"]["codebook_size"]}
    facts["shape"] = " x ".join(map(str, facts["shape"]))
    columns = [f"- `{name}`: " + MEANINGS.get(name, "of the source").format(**facts) for name in first["columns"]]
    data = DatasetCardData(
        tags=["optvq", "image-tokens"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"{DATA_FOLDER}/{name}-*.parquet"} for name in splits],
            }
        ],
    )
    of_hub = model.get("revision") is not None
    names = sorted({split["settings"]["dataset"]["name"] for split in splits.values()})
    names_of = {
        "repository": repository,
        "model_id": model["id"] if of_hub else "FOLDER_OF_THE_MODEL",
        "options": "" if of_hub else " --model FOLDER_OF_THE_MODEL",
    }
    return TEXT.format(
        **{name: text.format(**names_of) for name, text in words.items()},
        data=data.to_yaml(),
        datasets=", ".join(f"`{name}`" for name in names),
        model=f"`{model['id']}`",
        revision=f" at revision `{model['revision']}`" if of_hub else " of a folder",
        version=manifest["optvq_hf"],
        splits="\n".join(
            f"| {name} | `{split['settings']['dataset']['split']}` | {split['images']:,} | {split['rows']:,} "
            f"| {split['num_unreadable']:,} |"
            for name, split in splits.items()
        ),
        columns="\n".join(columns),
        digest=model[DIGEST],
        repository=repository,
        split=next(iter(splits)),
        model_id=names_of["model_id"],
    )
