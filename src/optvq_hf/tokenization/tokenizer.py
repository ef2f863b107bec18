"""The tokenizer of batches, which every engine calls: `datasets.map`, Ray Data and `optvq tokenize`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from PIL.Image import Image

from ..data.batches import ImageCollator
from ..data.fingerprint import drawn
from ..data.loading import UnreadableImageError, decode_image
from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from ..training.models import load_model


# Most images, and most pixel values, of a batch whose size is not given.
MOST_IMAGES, MOST_VALUES = 256, 2**22


class Prepared(NamedTuple):
    """Images of a batch, ready for the encoder.

    Attributes:
        pixel_values: (rows, num_channels, H, W) float32 in [-1, 1], all rows of an image in turn; None if no image of the
            batch can be read.
        columns: The other columns, with a value per row.
        unreadable: Number in the batch, and reason, of each image that cannot be read.
    """

    pixel_values: torch.Tensor | None
    columns: dict[str, list]
    unreadable: list[tuple[int, str]]


class OptVQTokenizer:
    """Turns batches, dicts of columns, into batches with `codes` instead of images. Can be pickled.

    `dataset.map(OptVQTokenizer(model), batched=True, remove_columns=dataset.column_names)` and, with Ray Data,
    `dataset.map_batches(OptVQTokenizer, fn_constructor_args=[model], concurrency=2)` tokenize a dataset.

    Args:
        model: Hub id or folder, which is loaded on first use, or a model in evaluation mode.
        revision: Branch, tag or commit of a model on the Hub.
        image_processor: By default that of the Hub id or folder.
        image_column: Column of images: what the image processor takes, or undecoded as {"bytes", "path"}.
        assignment: "nearest", "potentials" or "sinkhorn"; by default the model's own. On CPUs, and but for the last, the codes
            of an image do not depend on its batch.
        dtype: "float32" or "bfloat16", of the encoder; a model that is given keeps its own.
        flips: Also return every image mirrored, as a row with `flipped`.
        crops: Also return so many random crops of every image, as rows with `crop` from 1 on; 0 is the centre crop.
        seed: Of the crops, which depend on it and on the image alone.
        skip_unreadable: Return no rows for images that cannot be read, instead of an error.
        device: By default a GPU where there is one; a model that is given stays where it is.

    Returns (of a call):
        The other columns, and `codes`, (rows, num_codebook_heads, H/f, W/f) of the smallest unsigned integers that hold all
        codes; with flips or crops also `crop` and `flipped`.

    Raises:
        UnreadableImageError, FileNotFoundError, ValueError: When called, for an image that cannot be read, a batch without
            `image_column`, or pictures of different sizes.
    """

    def __init__(
        self,
        model: str | OptVQModel,
        revision: str | None = None,
        image_processor: OptVQImageProcessor | None = None,
        image_column: str = "image",
        assignment: str | None = None,
        dtype: str | None = None,
        flips: bool = False,
        crops: int = 0,
        seed: int = 0,
        skip_unreadable: bool = False,
        device: str | torch.device | None = None,
    ):
        if not isinstance(model, str) and image_processor is None:
            raise ValueError("a model without a name needs its image processor: pass image_processor=...")
        if not isinstance(model, str) and (dtype, device) != (None, None):
            raise ValueError("dtype and device are for a model that is given by name: move this one yourself")
        self.source, self.revision, self.image_column = model, revision, image_column
        self.assignment, self.dtype, self.device = assignment, dtype, device
        self.flips, self.crops, self.seed = flips, crops, seed
        self.skip_unreadable = skip_unreadable
        self._image_processor = image_processor
        self._model: OptVQModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, if it can be loaded again, and without the memory of a device."""
        return {**self.__dict__, "_model": None}

    @property
    def model(self) -> OptVQModel:
        """The model on its device, in its precision."""
        if self._model is None:
            self._load()
        assert self._model is not None
        return self._model

    @property
    def image_processor(self) -> OptVQImageProcessor:
        """The image processor of the model."""
        if self._image_processor is None:
            self._load()
        assert self._image_processor is not None
        return self._image_processor

    def _load(self) -> None:
        if not isinstance(self.source, str):
            self._model = self.source.eval()
            return
        model, image_processor = load_model(self.source, revision=self.revision)
        self._image_processor = self._image_processor or image_processor
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval()
        self._model.to(device, getattr(torch, self.dtype or "float32"))  # pyright: ignore[reportArgumentType]

    @property
    def views(self) -> list[tuple[int, bool]]:
        """The rows of every image: `crop` and `flipped` of each."""
        return [
            (crop, flipped) for crop in range(self.crops + 1) for flipped in ((False, True) if self.flips else (False,))
        ]

    @property
    def code_dtype(self) -> np.dtype:
        """The smallest unsigned integers that hold all codes."""
        return np.min_scalar_type(self.model.config.codebook_size - 1)

    def code_shape(self) -> tuple[int, ...]:
        """Heads, height and width of the codes of a picture. Only with a crop is it the same for every picture."""
        if not self.image_processor.do_center_crop:
            raise ValueError("the image processor does not crop, so codes have no fixed shape: set do_center_crop")
        crop, factor = self.image_processor.crop_size, self.model.config.downsample_factor
        if crop.height % factor or crop.width % factor:
            raise ValueError(
                f"the image processor crops to {crop.height} x {crop.width} pixels, which the downsampling factor {factor} of "
                "the model does not divide"
            )
        return self.model.config.codes_per_token, crop.height // factor, crop.width // factor

    def __call__(self, batch: Mapping[str, Sequence]) -> dict[str, Any]:
        prepared = self.prepare(batch)
        if prepared.unreadable and not self.skip_unreadable:
            number, reason = prepared.unreadable[0]
            raise UnreadableImageError(f"image {number} of a batch: {reason}; skip_unreadable=True skips such images")
        return {**prepared.columns, "codes": self.encode(prepared.pixel_values)}

    def prepare(self, batch: Mapping[str, Sequence]) -> Prepared:
        """Decodes, resizes and crops the images of a batch; for the workers that read."""
        if self.image_column not in batch:
            raise ValueError(f"the batch has no column {self.image_column!r}; its columns are {', '.join(batch)}")
        images, unreadable = [], []
        center = ImageCollator(self.image_processor)
        for number, value in enumerate(batch[self.image_column]):
            try:
                picture = decode_image(value) if value is None or isinstance(value, dict) else value
                is_ready = (
                    isinstance(picture, Image) and not self.crops
                )  # `stack` reads it, and it need not be read twice
                images.append((number, picture, picture if is_ready else center.augment(picture)))
            except (UnreadableImageError, FileNotFoundError) as error:
                unreadable.append((number, str(error)))
        views = self.views
        rows = [number for number, *_ in images for _ in views]
        columns = {
            name: [values[number] for number in rows] for name, values in batch.items() if name != self.image_column
        }
        if len(views) > 1:
            columns |= {"crop": [crop for crop, _ in views] * len(images)}
            columns |= {"flipped": [flipped for _, flipped in views] * len(images)}
        if not images:
            return Prepared(None, columns, unreadable)
        of_crops = [center.stack([pixels for *_, pixels in images])]
        if self.crops:
            random = ImageCollator(self.image_processor, random_crop=True)
            seeds = [drawn({"bytes": pixels.numpy().tobytes()}, self.seed) for *_, pixels in images]
            for crop in range(1, self.crops + 1):
                cropped = [random.augment(picture, (seed, crop)) for (_, picture, _), seed in zip(images, seeds)]
                of_crops.append(random.stack(cropped))
        pixel_values = torch.stack(of_crops, dim=1)
        if self.flips:
            pixel_values = torch.stack([pixel_values, pixel_values.flip(-1)], dim=2)
        return Prepared(pixel_values.view(-1, *pixel_values.shape[-3:]), columns, unreadable)

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor | None) -> np.ndarray:
        """Codes (rows, num_codebook_heads, H/f, W/f) of pixel values; no rows for None."""
        if pixel_values is None:
            return np.zeros((0, *self.code_shape()), self.code_dtype)
        pixels = pixel_values.to(self.model.device, non_blocking=True)
        encode: Any = self.model.encode  # annotated without `return_dict` of its decorator
        encoded = encode(pixels, assignment=self.assignment, return_loss=False, return_dict=True)
        return encoded.codes.cpu().numpy().astype(self.code_dtype)

    def find_batch_size(self) -> int:
        """Images per batch whose rows fit into the memory of the device: at most 256, and 2^22 pixel values."""
        factor = self.model.config.downsample_factor
        _, height, width = self.code_shape()
        shape = (self.model.config.num_channels, height * factor, width * factor)
        of_image = int(np.prod(shape)) * len(self.views)

        def try_out(batch_size: int) -> int:
            self.encode(torch.zeros(batch_size * len(self.views), *shape))
            return batch_size

        most = max(1, min(MOST_IMAGES, MOST_VALUES // of_image))
        if self.model.device.type == "cpu":
            return most
        return find_executable_batch_size(try_out, starting_batch_size=most)()
