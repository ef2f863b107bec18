"""Which images a result is of: one digest, whatever reads the images and in what batches."""

import hashlib
from collections.abc import Iterable

import torch


def image_digests(images: torch.Tensor) -> list[bytes]:
    """SHA-256 of each image in 8 bits, with its shape.

    Args:
        images: (B, C, H, W) float in [-1, 1].
    """
    pixels = ((images.float() + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return [hashlib.sha256(f"{image.shape}:".encode() + image.tobytes()).digest() for image in pixels]


def images_sha256(digests: Iterable[bytes]) -> str:
    """SHA-256 of the digests of images, in their order, as 64 hexadecimal digits.

    Args:
        digests: Of [`image_digests`]; of all batches, one after another.
    """
    return hashlib.sha256(b"".join(digests)).hexdigest()
