"""Codes: their check, the perplexity of their frequencies, and their form as the ids of one sequence for a language model."""

from numbers import Integral

import torch

from .solver_inputs import check_tensor


def check_integers(integers: torch.Tensor, name: str) -> torch.Tensor:
    """Integers of any dtype as int64; numbers beyond it become the largest.

    Raises:
        ValueError: For another dtype, with the name of the tensor.
    """
    if integers.is_floating_point() or integers.is_complex() or integers.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {integers.dtype}")
    wide = integers.long()
    return wide.masked_fill(wide < 0, torch.iinfo(torch.int64).max) if integers.dtype == torch.uint64 else wide


def check_codes(codes: torch.Tensor, codebook_size: int, lowest: int = 0) -> torch.Tensor:
    """Codes of any integer dtype as int64.

    Raises:
        ValueError: For another dtype.
        IndexError: For codes that are not in [lowest, codebook_size). Compiled code does not look.
    """
    codes = check_integers(codes, "codes")
    if codes.numel() and not codes.is_meta and not torch.compiler.is_compiling():
        low, high = (bound.item() for bound in codes.aminmax())
        if low < lowest or high >= codebook_size:
            raise IndexError(f"codes must lie in [0, {codebook_size}), got values from {low} to {high}")
    return codes


def to_token_ids(codes: torch.Tensor, num_heads: int, codebook_size: int, first_token_id: int = 0) -> torch.Tensor:
    """Codes (B, num_heads, H, W) to ids (B, H * W * num_heads), see [`~modeling_optvq.OptVQModel.to_token_ids`]."""
    check_tensor(codes, "codes")
    if codes.ndim != 4 or codes.shape[1] != num_heads:
        raise ValueError(f"codes must be (B, {num_heads}, H, W), with {num_heads} heads, got {tuple(codes.shape)}")
    ids = check_codes(codes, codebook_size).movedim(1, -1).flatten(1)
    return ids + _first_ids(ids.shape[1], num_heads, codebook_size, first_token_id, codes.device)


def from_token_ids(
    token_ids: torch.Tensor, num_heads: int, codebook_size: int, first_token_id: int, grid: tuple[int, int]
) -> torch.Tensor:
    """Inverts [`to_token_ids`] for a grid of tokens, see [`~modeling_optvq.OptVQModel.from_token_ids`]."""
    check_tensor(token_ids, "token_ids")
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2 and all(map(_is_integer, grid))):
        raise ValueError(f"grid must be height and width in tokens, got {grid}")
    height, width = map(int, grid)
    length = height * width * num_heads
    if min(height, width) < 1 or token_ids.ndim != 2 or token_ids.shape[1] != length:
        raise ValueError(
            f"token_ids must be (B, {length}), {height} x {width} tokens of {num_heads} codes, got {tuple(token_ids.shape)}"
        )
    first_ids = _first_ids(length, num_heads, codebook_size, first_token_id, token_ids.device)
    codes = check_integers(token_ids, "token_ids") - first_ids
    is_wrong = (codes < 0) | (codes >= codebook_size)
    if is_wrong.any():
        row, position = is_wrong.nonzero()[0].tolist()
        first = int(first_ids[position])
        raise ValueError(
            f"token_ids[{row}, {position}] is {token_ids[row, position].item()}, but position {position} is for head "
            f"{position % num_heads}, whose ids are {first} to {first + codebook_size - 1}"
        )
    return codes.unflatten(1, (height, width, num_heads)).movedim(-1, 1)


def _first_ids(
    length: int, num_heads: int, codebook_size: int, first_token_id: int, device: torch.device
) -> torch.Tensor:
    """(length,): the id of code 0 at every position of a sequence."""
    if not _is_integer(first_token_id) or first_token_id < 0:
        raise ValueError(f"first_token_id must be an integer, 0 or greater, got {first_token_id!r}")
    last = int(first_token_id) + num_heads * codebook_size - 1
    if last > torch.iinfo(torch.int64).max:
        raise ValueError(f"first_token_id is too large: the last id would be {last}, beyond int64")
    return int(first_token_id) + torch.arange(num_heads, device=device).repeat(length // num_heads) * codebook_size


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """Exponential of the entropy of code frequencies: 0-dim in [1, K], from counts (K,) of any dtype; 1 without counts."""
    frequencies = counts / counts.sum().clamp_min(1)
    return torch.special.entr(frequencies).sum().exp()
