"""Pipelines: pictures to codes, and pictures to reconstructions."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import Pipeline

from .image_processing_optvq import image_columns, psnr


if TYPE_CHECKING:
    from .image_processing_optvq import OptVQImageProcessor
    from .modeling_optvq import OptVQModel


# Pictures at a time where the caller does not say.
BATCH_SIZE = 32
# What torch says of pictures that do not go into one batch.
DIFFERENT_SIZES = "Sizes of tensors must match except in dimension 0"


class OptVQPipeline(Pipeline):
    """Base class of both pipelines: what they accept as pictures.

    One picture gives one result; it is whatever the image processor takes. A list, or an array of four dimensions, gives a
    list. A dataset of the `datasets` library, one of its columns, or a generator gives an iterator, which reads pictures when
    they are needed.

    Args of a call:
        inputs: As above.
        image_column: Image column of a dataset; by default the only one.
        batch_size: Pictures at a time. It does not change the codes, unless `assignment="sinkhorn"`. By default 32 of a list or
            a dataset of known length; 1 of streams, with that assignment, and with an image processor that does not crop.
        assignment: "nearest", "potentials" or "sinkhorn"; by default the model's own.
        keep_size: Neither resize nor crop pictures, but repeat their last row and column until f divides both sides. The
            results have `original_size`, height and width. Pictures are then taken one at a time, unless `batch_size` says
            otherwise, for pictures that have one size when padded.
        tile_size: Side in pixels of the tiles that large pictures are encoded and decoded in, see [`OptVQModel.encode`].
        num_workers: Processes that read and resize pictures.

    Raises:
        FileNotFoundError, ValueError: For what the image processor refuses, a batch of pictures of different sizes, or a
            dataset without or with several columns of images.
    """

    _load_processor = _load_feature_extractor = _load_tokenizer = _load_video_processor = False
    _load_image_processor = True

    model: "OptVQModel"
    image_processor: "OptVQImageProcessor"

    def __call__(self, inputs: Any, image_column: str | None = None, **kwargs: Any) -> Any:
        if type(inputs).__module__.partition(".")[0] == "datasets":
            inputs = _images_of(inputs, image_column)
        elif isinstance(inputs, tuple) or (isinstance(inputs, (np.ndarray, torch.Tensor)) and inputs.ndim == 4):
            inputs = list(inputs)
        if kwargs.get("batch_size") is None and self._batch_size is None and self._may_batch(inputs, **kwargs):
            kwargs["batch_size"] = BATCH_SIZE
        if not _may_hold_some(inputs):
            return []
        return super().__call__(inputs, **kwargs)

    def get_iterator(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the number of results and errors of [`_Results`]."""
        results = super().get_iterator(inputs, *args, **kwargs)
        return _Results(results, len(inputs) if _has_length(inputs) else None)

    def _may_batch(
        self, inputs: Any, assignment: str | None = None, keep_size: bool | None = None, **kwargs: Any
    ) -> bool:
        """Whether the pictures are known to be several, have one size, and get the same codes in every batch."""
        assignment = assignment or self._forward_params.get("assignment") or self.model.config.inference_assignment
        keep_size = self._preprocess_params.get("keep_size") if keep_size is None else keep_size
        have_one_size = bool(self.image_processor.do_center_crop) and not keep_size
        return _has_length(inputs) and assignment != "sinkhorn" and have_one_size

    def preprocess(self, image: Any, keep_size: bool = False) -> dict[str, torch.Tensor]:
        options = {}
        if keep_size:
            factor = self.model.config.downsample_factor
            options = {"do_resize": False, "do_center_crop": False, "pad_to_multiple_of": factor}
        return dict(self.image_processor([image], return_tensors="pt", **options))


class ImageTokenizationPipeline(OptVQPipeline):
    """Pictures to discrete codes: `pipeline("image-tokenization", model=...)`.

    Takes what [`OptVQPipeline`] takes.

    Args of a call:
        return_token_ids: Also return the codes as one sequence of ids, for a language model.
        first_token_id: First of these ids; see [`OptVQModel.to_token_ids`].

    Returns:
        Per picture a dict with `codes`, int64 (codes_per_token, H/f, W/f), which `model.decode(codes=codes[None])`
        decodes; and on request `token_ids`, int64 (H/f * W/f * codes_per_token,), and `original_size`, a pair, to which
        `image_processor.postprocess(reconstruction, [original_size])` crops.

    Example:

    ```python
    tokenize = pipeline("image-tokenization", model="runs/quickstart")
    codes = tokenize("picture.png")["codes"]
    ```
    """

    def _sanitize_parameters(
        self,
        assignment: str | None = None,
        keep_size: bool | None = None,
        tile_size: int | None = None,
        return_token_ids: bool | None = None,
        first_token_id: int | None = None,
    ) -> tuple[dict, dict, dict]:
        given = {"return_token_ids": return_token_ids, "first_token_id": first_token_id}
        of_model = _without_none(assignment=assignment, tile_size=tile_size)
        return _without_none(keep_size=keep_size), of_model, _without_none(**given)

    def _forward(self, inputs: dict, **options: Any) -> dict[str, Any]:
        pixel_values, sizes = _without_sizes(inputs)
        encode: Any = self.model.encode  # annotated without `return_dict` of its decorator
        return {"codes": encode(pixel_values, return_loss=False, return_dict=True, **options).codes, **sizes}

    def postprocess(self, outputs: dict, return_token_ids: bool = False, first_token_id: int = 0) -> dict:
        result = {"codes": outputs["codes"][0], **_original_size(outputs)}
        if return_token_ids:
            result["token_ids"] = self.model.to_token_ids(outputs["codes"], first_token_id)[0]
        return result


class ImageReconstructionPipeline(OptVQPipeline):
    """Pictures to their reconstructions from codes: `pipeline("image-reconstruction", model=...)`.

    Takes what [`OptVQPipeline`] takes.

    Args of a call:
        return_metrics: Also return the pixel errors against the picture as resized and cropped by the image processor.

    Returns:
        Per picture a dict with `image`, a PIL image of mode "RGB" or, for one channel, "L"; and on request `metrics`, a dict
        with `mse` on the scale [-1, 1] and `psnr` in dB (peak 1 on the scale [0, 1]; at most 100, for a perfect one), of the
        clamped reconstruction; and `original_size`, a pair, that of the image.
    """

    def _sanitize_parameters(
        self,
        assignment: str | None = None,
        keep_size: bool | None = None,
        tile_size: int | None = None,
        return_metrics: bool | None = None,
    ) -> tuple[dict, dict, dict]:
        of_model = _without_none(assignment=assignment, tile_size=tile_size)
        return _without_none(keep_size=keep_size), of_model, _without_none(return_metrics=return_metrics)

    def _forward(self, inputs: dict, tile_size: int | None = None, **options: Any) -> dict[str, torch.Tensor]:
        pixel_values, sizes = _without_sizes(inputs)
        encode: Any = self.model.encode
        decode: Any = self.model.decode
        options_of_both = {"tile_size": tile_size, "return_dict": True}
        quantized = encode(pixel_values, return_loss=False, **options_of_both, **options).quantized
        reconstruction = decode(quantized, **options_of_both).reconstruction
        return {"reconstruction": reconstruction, "pixel_values": pixel_values, **sizes}

    def postprocess(self, outputs: dict, return_metrics: bool = False) -> dict:
        [image] = self.image_processor.postprocess(outputs["reconstruction"], outputs.get("original_sizes"))
        result = {"image": image, **_original_size(outputs)}
        if return_metrics:
            reconstruction, original = outputs["reconstruction"].float().clamp(-1, 1), outputs["pixel_values"].float()
            error = (reconstruction - original)[..., : image.height, : image.width]
            mse = error.square().mean()
            result["metrics"] = {"mse": mse.item(), "psnr": psnr(mse).item()}
        return result


class _Results(Iterator):
    """An iterator over results whose length is their number; transformers 5.23 would say that of the batches.

    Raises:
        TypeError: When asked for the length of a stream, whose `number` is None.
        ValueError: For a batch of pictures of different sizes.
    """

    def __init__(self, results: Iterable[Any], number: int | None):
        self.results, self.number = iter(results), number

    def __next__(self) -> Any:
        try:
            return next(self.results)
        except RuntimeError as error:  # transformers 5.23 concatenates what it has prepared
            if DIFFERENT_SIZES not in str(error):
                raise
            raise ValueError(
                "pictures of different sizes make no batch: pass batch_size=1, or crop them (do_center_crop)"
            ) from error

    def __len__(self) -> int:
        if self.number is None:
            raise TypeError("the number of results of a stream is not known")
        return self.number


class _Pictures(Dataset):
    """The pictures of a dataset, or of one of its columns, by their number."""

    def __init__(self, rows: Any, column: str | None = None):
        self.rows, self.column = rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number] if self.column is None else self.rows[number][self.column]


def _has_length(inputs: Any) -> bool:
    """Whether these are several pictures, whose number is known."""
    return isinstance(inputs, list) or (isinstance(inputs, Dataset) and not isinstance(inputs, IterableDataset))


def _may_hold_some(inputs: Any) -> bool:
    """False for lists and datasets of length 0, for which transformers 5.23 would fail to read the first entry."""
    return not _has_length(inputs) or len(inputs) > 0


def _images_of(dataset: Any, column: str | None) -> Any:
    """Iterates over the pictures of a dataset or of one of its columns."""
    if not hasattr(dataset, "column_names"):
        return _Pictures(dataset) if hasattr(dataset, "__len__") else (image for image in dataset)
    if isinstance(dataset, dict):
        raise ValueError(f"the dataset has splits: pass one of {', '.join(dataset)}")
    # Columns that a transform makes are not among the features.
    features = {} if getattr(dataset, "format", {}).get("type") == "custom" else dataset.features or {}
    if column is None:
        columns = image_columns(features)
        if len(columns) != 1:
            raise ValueError(f"the dataset has {len(columns)} columns known to hold images: pass image_column=...")
        column = str(columns[0])
    elif features and column not in features:
        raise ValueError(f"the dataset has no column {column!r}; its columns are {', '.join(features)}")
    return _Pictures(dataset, column) if hasattr(dataset, "__len__") else _column_of(dataset, column)


def _column_of(stream: Iterable[dict], column: str) -> Iterator[Any]:
    for row in stream:
        if column not in row:
            raise ValueError(f"the dataset has no column {column!r}; its columns are {', '.join(row)}")
        yield row[column]


def _without_sizes(inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pixel values, and what else the image processor gives: the sizes of pictures that it has padded."""
    return inputs["pixel_values"], {name: value for name, value in inputs.items() if name == "original_sizes"}


def _original_size(outputs: dict) -> dict[str, tuple[int, ...]]:
    """Of one picture, if the image processor has padded it."""
    return {"original_size": tuple(outputs["original_sizes"][0].tolist())} if "original_sizes" in outputs else {}


def _without_none(**parameters: Any) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}
