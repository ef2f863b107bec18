"""Shows whether a Frechet distance orders known degradations: blur, noise and JPEG at rising strength.

    python scripts/check_frechet.py --dataset path/to/photos256 --max-images 100

Prints a Markdown table of the distance between photographs and the same photographs degraded, and ends with exit code 1 if a
stronger degradation is not further away. `--metric` takes what `optvq evaluate --metrics` takes for a Frechet distance.
"""

import argparse
import io
import sys
import zlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image, ImageFilter

from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import evaluation_batches
from optvq_hf.evaluation.feature_networks import FeatureNetwork, load_network
from optvq_hf.evaluation.frechet import FeatureSums, frechet_distance
from optvq_hf.image_processing_optvq import OptVQImageProcessor


def blur(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def noise(image: Image.Image, deviation: float) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    noisy = pixels + np.random.default_rng(zlib.crc32(image.tobytes())).normal(0, deviation, pixels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: float) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    return Image.open(file).convert("RGB")


# Name, how its strength is called, the function, and strengths from weak to strong.
DEGRADATIONS: list[tuple[str, str, Callable[[Image.Image, float], Image.Image], tuple[float, ...]]] = [
    ("Gaussian blur", "radius in pixels", blur, (0.5, 1, 2, 4)),
    ("Gaussian noise", "standard deviation of 255", noise, (4, 8, 16, 32)),
    ("JPEG", "quality", jpeg, (80, 40, 20, 10)),
]


def measure(images: list[Image.Image], network: FeatureNetwork) -> dict[str, list[float]]:
    """The distances of all strengths of each degradation."""
    originals = _sums(images, network)
    return {
        name: [frechet_distance(originals, _sums((degrade(i, s) for i in images), network)) for s in strengths]
        for name, _, degrade, strengths in DEGRADATIONS
    }


def orders_rightly(distances: dict[str, list[float]]) -> bool:
    """Whether every degradation is further away the stronger it is."""
    return all(weak < strong for row in distances.values() for weak, strong in zip(row, row[1:]))


def _sums(images: Iterable[Image.Image], network: FeatureNetwork) -> FeatureSums:
    sums = None
    for image in images:
        pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)[None] / 127.5 - 1
        of_image = FeatureSums.of(network(pixels))
        sums = sums + of_image if sums else of_image
    assert sums is not None
    return sums


def read_images(dataset: str, split: str, max_images: int, side: int) -> list[Image.Image]:
    """RGB pictures of a dataset, cropped to a square."""
    processor = OptVQImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    batches = evaluation_batches(DataArguments(dataset=dataset, eval_split=split), processor, 50, max_images)
    return [picture for batch in batches for picture in processor.postprocess(batch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--max-images", type=int, default=100)
    parser.add_argument("--side", type=int, default=256, help="height and width of the images")
    parser.add_argument("--metric", default="fd-efficientnet-lite0")
    arguments = parser.parse_args()
    images = read_images(arguments.dataset, arguments.split, arguments.max_images, arguments.side)
    distances = measure(images, load_network(arguments.metric))
    print(f"{arguments.metric}, {len(images)} images of {arguments.side} x {arguments.side}\n")
    print("| degradation | strength | distance, weak to strong |\n| - | - | - |")
    for name, unit, _, strengths in DEGRADATIONS:
        shown = ", ".join(f"{distance:.1f}" for distance in distances[name])
        print(f"| {name} | {unit} {', '.join(map(str, strengths))} | {shown} |")
    if not orders_rightly(distances):
        sys.exit("a stronger degradation is not further away")


if __name__ == "__main__":
    main()
