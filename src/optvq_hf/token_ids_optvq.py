"""Codes as the ids of one sequence, for a language model, and back."""

from numbers import Integral
from typing import Any

import torch

from .codes_optvq import check_codes, check_integers
from .solver_inputs import check_tensor


class TokenIdsMixin:
    """The methods of [`~modeling_optvq.OptVQModel`] that turn codes and images into token ids and back."""

    config: Any
    encode: Any
    decode: Any
    _check_config: Any

    def to_token_ids(self, codes: torch.Tensor, first_token_id: int = 0) -> torch.Tensor:
        """Flattens codes to one sequence of ids for a language model.

        The order is row by row, and within a token level by level and head by head. Every head of every level has ids of its
        own: code k of the b-th of these, from 0, has the id `first_token_id + b * codebook_size + k`.

        Args:
            codes: integer in [0, codebook_size), (B, codes_per_token, H/f, W/f).
            first_token_id: First id of the image tokens in the language model's vocabulary, 0 or more.

        Returns:
            int64 (B, H/f * W/f * codes_per_token), in [first_token_id, first_token_id + config.vocab_size).

        Raises:
            ValueError: For another shape, a dtype that is not an integer, or a negative `first_token_id`.
            IndexError: For codes out of range.
        """
        self._check_config()
        return _to_token_ids(codes, self.config.codes_per_token, self.config.codebook_size, first_token_id)

    def from_token_ids(
        self, token_ids: torch.Tensor, first_token_id: int = 0, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Inverts [`OptVQModel.to_token_ids`], for [`OptVQModel.decode`].

        Args:
            token_ids: integer, (B, length).
            first_token_id: As in `to_token_ids`.
            grid: Height and width in tokens; by default those of a `config.image_size` x `config.image_size` image.

        Returns:
            codes: int64 (B, codes_per_token, height, width).

        Raises:
            ValueError: If they are not integers, the length does not fit the grid, or an id does not belong to the code
                whose turn it is, of a head of a level.
        """
        self._check_config()
        if grid is None:
            self.config.validate()  # its image size may have changed
            grid = (self.config.latent_size, self.config.latent_size)
        return _from_token_ids(token_ids, self.config.codes_per_token, self.config.codebook_size, first_token_id, grid)

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images to token ids, under the name that Emu3 and Janus have in transformers.

        With one code per token these are the codes, row by row; with several, [`OptVQModel.to_token_ids`] says their order.

        Args:
            pixel_values: (B, num_channels, H, W) float in [-1, 1], H and W multiples of f.

        Returns:
            int64 (B, H/f * W/f * codes_per_token), in [0, config.vocab_size).

        Raises:
            ValueError: As [`OptVQModel.encode`].
        """
        encoded = self.encode(pixel_values, return_loss=False, return_dict=True)
        return self.to_token_ids(encoded.codes)

    @torch.no_grad()
    def decode_image_tokens(self, image_tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Token ids to images, under the name that Emu3 and Janus have in transformers.

        Args:
            image_tokens: integer (B, height * width * codes_per_token), as [`OptVQModel.get_image_tokens`] returns them.
            height, width: Of the images, in tokens.

        Returns:
            (B, num_channels, height * f, width * f) float; images are in [-1, 1], the decoder may go a little beyond.

        Raises:
            ValueError: As [`OptVQModel.from_token_ids`].
        """
        codes = self.from_token_ids(image_tokens, grid=(height, width))
        return self.decode(codes=codes, return_dict=True).reconstruction


def _to_token_ids(
    codes: torch.Tensor, codes_per_token: int, codebook_size: int, first_token_id: int = 0
) -> torch.Tensor:
    """Codes (B, codes_per_token, H, W) to ids (B, H * W * codes_per_token), see [`TokenIdsMixin.to_token_ids`]."""
    check_tensor(codes, "codes")
    if codes.ndim != 4 or codes.shape[1] != codes_per_token:
        raise ValueError(
            f"codes must be (B, {codes_per_token}, H, W), {codes_per_token} for each token, got {tuple(codes.shape)}"
        )
    ids = check_codes(codes, codebook_size).movedim(1, -1).flatten(1)
    return ids + _first_ids(ids.shape[1], codes_per_token, codebook_size, first_token_id, codes.device)


def _from_token_ids(
    token_ids: torch.Tensor, codes_per_token: int, codebook_size: int, first_token_id: int, grid: tuple[int, int]
) -> torch.Tensor:
    """Inverts [`_to_token_ids`] for a grid of tokens, see [`TokenIdsMixin.from_token_ids`]."""
    check_tensor(token_ids, "token_ids")
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2 and all(map(_is_integer, grid))):
        raise ValueError(f"grid must be height and width in tokens, got {grid}")
    height, width = map(int, grid)
    length = height * width * codes_per_token
    if min(height, width) < 1 or token_ids.ndim != 2 or token_ids.shape[1] != length:
        raise ValueError(
            f"token_ids must be (B, {length}), {height} x {width} tokens of {codes_per_token} codes, "
            f"got {tuple(token_ids.shape)}"
        )
    first_ids = _first_ids(length, codes_per_token, codebook_size, first_token_id, token_ids.device)
    codes = check_integers(token_ids, "token_ids") - first_ids
    is_wrong = (codes < 0) | (codes >= codebook_size)
    if is_wrong.any():
        row, position = is_wrong.nonzero()[0].tolist()
        first = int(first_ids[position])
        raise ValueError(
            f"token_ids[{row}, {position}] is {token_ids[row, position].item()}, but position {position} is for "
            f"code {position % codes_per_token} of its token, whose ids are {first} to {first + codebook_size - 1}"
        )
    return codes.unflatten(1, (height, width, codes_per_token)).movedim(-1, 1)


def _first_ids(
    length: int, codes_per_token: int, codebook_size: int, first_token_id: int, device: torch.device
) -> torch.Tensor:
    """(length,): the id of code 0 at every position of a sequence."""
    if not _is_integer(first_token_id) or first_token_id < 0:
        raise ValueError(f"first_token_id must be an integer, 0 or greater, got {first_token_id!r}")
    last = int(first_token_id) + codes_per_token * codebook_size - 1
    if last > torch.iinfo(torch.int64).max:
        raise ValueError(f"first_token_id is too large: the last id would be {last}, beyond int64")
    return (
        int(first_token_id)
        + torch.arange(codes_per_token, device=device).repeat(length // codes_per_token) * codebook_size
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
