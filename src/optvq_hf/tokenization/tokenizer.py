"""The tokenizer of batches, which every engine calls: `datasets.map`, Ray Data and `optvq tokenize`."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from PIL.Image import Image

from ..data.batches import ImageCollator, check_no_padding
from ..data.fetching import find_folder
from ..data.fingerprint import drawn
from ..data.loading import UnreadableImageError, decode_image
from ..image_processing_optvq import OptVQImageProcessor
from ..modeling_optvq import OptVQModel
from ..training.digests import folder_digest
from ..training.models import MODEL_FILES, load_model


# Most images, and most pixel values, of a batch whose size is not given.
MOST_IMAGES, MOST_VALUES = 256, 2**22
# Most pixels of a picture that is resized together with others, which is faster but holds them all at their full size.
MOST_PIXELS = 2**18


class Prepared(NamedTuple):
    """Images of a batch, ready for the encoder.

    Attributes:
        pixel_values: (rows, num_channels, H, W) float32 in [-1, 1], all rows of an image in turn; None if no image of the
            batch can be read.
        columns: The other columns, with a value per row.
        unreadable: Number in the batch, and reason, of each image that cannot be read or is smaller than the crop.
    """

    pixel_values: torch.Tensor | None
    columns: dict[str, list]
    unreadable: list[tuple[int, str]]


class OptVQTokenizer:
    """Turns batches, dicts of columns, into batches with `codes` instead of images. Can be pickled.

    A pickle has a digest of the model's files, so `datasets.map` never returns cached codes of files that have changed since.

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
        skip_unreadable: Return no rows for images that cannot be read or are smaller than the crop, instead of an error.
        device: By default a GPU where there is one; a model that is given stays where it is.
        tile_size: Side in pixels of the tiles that large images are encoded in, see [`OptVQModel.encode`].
        latents: Return what the encoder gives, see [`OptVQModel.encoder_output`], instead of codes.

    Returns (of a call):
        The other columns, and `codes`, (rows, codes_per_token, H/f, W/f) of the smallest unsigned integers that hold all
        codes, or `latents`, (rows, encoder_channels, H/f, W/f) float32; with flips or crops also `crop` and `flipped`.

    Raises:
        UnreadableImageError, ValueError: When called, for an image that cannot be read or is smaller than the crop, a batch
            without `image_column`, pictures of different sizes, or files of a model that have changed since it was pickled.
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
        tile_size: int | None = None,
        latents: bool = False,
    ):
        if not isinstance(model, str) and image_processor is None:
            raise ValueError("a model without a name needs its image processor: pass image_processor=...")
        if not isinstance(model, str) and (dtype, device) != (None, None):
            raise ValueError("dtype and device are for a model that is given by name: move this one yourself")
        self.source, self.revision, self.image_column = model, revision, image_column
        self.assignment, self.dtype, self.device = assignment, dtype, device
        self.flips, self.crops, self.seed = flips, crops, seed
        self.skip_unreadable, self.tile_size = skip_unreadable, tile_size
        self.column = "latents" if latents else "codes"
        self._image_processor = image_processor
        self._loaded: tuple[OptVQModel, OptVQImageProcessor | None] | None = None
        self._digest: str | None = None  # of the files that are loaded

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, if it can be loaded again, but with a digest of its files: `datasets.map` knows results by it."""
        digest = self._digest
        if digest is None and isinstance(self.source, str):
            digest = _digest_of(find_folder(self.source, MODEL_FILES, self.revision))
        return {**self.__dict__, "_loaded": None, "_digest": digest}

    @property
    def model(self) -> OptVQModel:
        """The model on its device, in its precision."""
        return self._load()[0]

    @property
    def image_processor(self) -> OptVQImageProcessor:
        """The image processor that is given, or that of the model."""
        processor = self._image_processor or self._load()[1]
        assert processor is not None
        return processor

    def _load(self) -> tuple[OptVQModel, OptVQImageProcessor | None]:
        if self._loaded is not None:
            return self._loaded
        if not isinstance(self.source, str):
            self._loaded = self.source.eval(), None
            return self._loaded
        model, image_processor = load_model(self.source, revision=self.revision)
        digest = _digest_of(find_folder(self.source, MODEL_FILES, self.revision))
        if self._digest not in (None, digest):
            raise ValueError(
                f"the files of model {self.source!r} have changed since its tokenizer was pickled: make a new tokenizer"
            )
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model.eval().to(device, getattr(torch, self.dtype or "float32"))  # pyright: ignore[reportArgumentType]
        self._loaded, self._digest = (model, image_processor), digest
        return self._loaded

    @property
    def views(self) -> list[tuple[int, bool]]:
        """The rows of every image: `crop` and `flipped` of each."""
        return [
            (crop, flipped) for crop in range(self.crops + 1) for flipped in ((False, True) if self.flips else (False,))
        ]

    @property
    def value_dtype(self) -> np.dtype:
        """The smallest unsigned integers that hold all codes; float32 of latents."""
        if self.column == "latents":
            return np.dtype(np.float32)
        return np.min_scalar_type(self.model.config.codebook_size - 1)

    def value_shape(self) -> tuple[int, ...]:
        """Heads or channels, height and width for a picture. Only with a crop are they the same for every picture."""
        check_no_padding(self.image_processor)
        if not self.image_processor.do_center_crop:
            raise ValueError("the image processor does not crop, so codes have no fixed shape: set do_center_crop")
        crop, factor = self.image_processor.crop_size, self.model.config.downsample_factor
        if crop.height % factor or crop.width % factor:
            raise ValueError(
                f"the image processor crops to {crop.height} x {crop.width} pixels, which the downsampling factor {factor} of "
                "the model does not divide"
            )
        config = self.model.config
        channels = config.encoder_channels if self.column == "latents" else config.codes_per_token
        return channels, crop.height // factor, crop.width // factor

    def __call__(self, batch: Mapping[str, Sequence]) -> dict[str, Any]:
        prepared = self.prepare(batch)
        if prepared.unreadable and not self.skip_unreadable:
            number, reason = prepared.unreadable[0]
            raise UnreadableImageError(f"image {number} of a batch: {reason}; skip_unreadable=True skips such images")
        return {**prepared.columns, self.column: self.encode(prepared.pixel_values)}

    def prepare(self, batch: Mapping[str, Sequence]) -> Prepared:
        """Decodes, resizes and crops the images of a batch; for the workers that read."""
        if self.image_column not in batch:
            raise ValueError(f"the batch has no column {self.image_column!r}; its columns are {', '.join(batch)}")
        center = ImageCollator(self.image_processor)
        pixels: dict[int, torch.Tensor] = {}  # of each picture, (crops + 1, num_channels, H, W)
        together: dict[int, Image | torch.Tensor] = {}
        unreadable: list[tuple[int, str]] = []

        def prepare_alone(number: int, picture: Any) -> None:
            try:
                pixels[number] = self._crops_of(picture, center)
            except ValueError as error:  # it is smaller than the crop
                unreadable.append((number, str(error)))

        for number, value in enumerate(batch[self.image_column]):
            try:
                picture = decode_image(value) if value is None or isinstance(value, dict) else value
                ready = picture if isinstance(picture, Image) else center.augment(picture)
            except (FileNotFoundError, ValueError) as error:
                unreadable.append((number, str(error)))
                continue
            size = ready.size if isinstance(ready, Image) else ready.shape[-2:]
            if not self.crops and (size[0] * size[1] <= MOST_PIXELS or not self.image_processor.do_center_crop):
                together[number] = ready
            else:
                prepare_alone(number, picture)
        try:
            if together:
                pixels |= zip(together, center.stack(list(together.values()))[:, None])
        except ValueError:
            if not self.image_processor.do_center_crop:
                raise
            for number, picture in together.items():
                prepare_alone(number, picture)
        numbers = sorted(pixels)
        rows = [number for number in numbers for _ in self.views]
        columns = {
            name: [values[number] for number in rows] for name, values in batch.items() if name != self.image_column
        }
        if len(self.views) > 1:
            columns |= {"crop": [crop for crop, _ in self.views] * len(numbers)}
            columns |= {"flipped": [flipped for _, flipped in self.views] * len(numbers)}
        if not numbers:
            return Prepared(None, columns, sorted(unreadable))
        pixel_values = torch.stack([pixels[number] for number in numbers])
        if self.flips:
            pixel_values = torch.stack([pixel_values, pixel_values.flip(-1)], dim=2)
        return Prepared(pixel_values.view(-1, *pixel_values.shape[-3:]), columns, sorted(unreadable))

    def _crops_of(self, picture: Any, center: ImageCollator) -> torch.Tensor:
        """Pixel values (crops + 1, num_channels, H, W) of a picture: of the centre crop, and of random ones."""
        pixels = center.augment(picture)
        crops = [center.stack([pixels])]
        if self.crops:
            random = ImageCollator(self.image_processor, random_crop=True)
            seed = drawn({"bytes": pixels.numpy().tobytes()}, self.seed)
            crops.append(random.stack([random.augment(picture, (seed, crop)) for crop in range(1, self.crops + 1)]))
        return torch.cat(crops)

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor | None) -> np.ndarray:
        """Codes or latents of pixel values, as a call returns them; no rows for None."""
        if pixel_values is None:
            return np.zeros((0, *self.value_shape()), self.value_dtype)
        pixels = pixel_values.to(self.model.device, non_blocking=True)
        if self.column == "latents":
            return self.model.encoder_output(pixels, self.tile_size).float().cpu().numpy()
        encode: Any = self.model.encode  # annotated without `return_dict` of its decorator
        options = {"assignment": self.assignment, "tile_size": self.tile_size, "return_dict": True}
        encoded = encode(pixels, return_loss=False, **options)
        return encoded.codes.cpu().numpy().astype(self.value_dtype)

    def find_batch_size(self) -> int:
        """Images per batch whose rows fit into the memory of the device: at most 256, and 2^22 pixel values."""
        factor = self.model.config.downsample_factor
        _, height, width = self.value_shape()
        shape = (self.model.config.num_channels, height * factor, width * factor)
        of_image = int(np.prod(shape)) * len(self.views)

        def try_out(batch_size: int) -> int:
            self.encode(torch.zeros(batch_size * len(self.views), *shape))
            return batch_size

        most = max(1, min(MOST_IMAGES, MOST_VALUES // of_image))
        if self.model.device.type == "cpu":
            return most
        return find_executable_batch_size(try_out, starting_batch_size=most)()


def _digest_of(folder: Path) -> str:
    """SHA-256 of all files of a model that decide its codes: weights, configuration and preprocessing."""
    digest = hashlib.sha256(folder_digest(folder).encode())
    for name in ("config.json", "preprocessor_config.json"):
        if (folder / name).is_file():  # loading says what is missing
            digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()
