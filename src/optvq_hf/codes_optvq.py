"""Codes: their check, and the perplexity of their frequencies."""

import torch


def check_integers(integers: torch.Tensor, name: str) -> torch.Tensor:
    """Integers of any dtype as int64; numbers beyond it become the largest.

    Raises:
        ValueError: For another dtype, with the name of the tensor.
    """
    if integers.is_floating_point() or integers.is_complex() or integers.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {integers.dtype}")
    wide = integers.long()
    return wide.masked_fill(wide < 0, torch.iinfo(torch.int64).max) if integers.dtype == torch.uint64 else wide


def check_codes(codes: torch.Tensor, codebook_size: int, lowest: int = 0, name: str = "codes") -> torch.Tensor:
    """Codes of any integer dtype as int64. `lowest` is -1 where that stands for no code; `name` is for messages.

    Raises:
        ValueError: For another dtype.
        IndexError: For codes that are not in [lowest, codebook_size). Compiled code does not look.
    """
    codes = check_integers(codes, name)
    if codes.numel() and not codes.is_meta and not torch.compiler.is_compiling():
        low, high = (bound.item() for bound in codes.aminmax())
        if low < lowest or high >= codebook_size:
            or_none = " or be -1" if lowest < 0 else ""
            raise IndexError(f"{name} must lie in [0, {codebook_size}){or_none}, got values from {low} to {high}")
    return codes


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """Exponential of the entropy of code frequencies: 0-dim in [1, K], from counts (K,) of any dtype; 1 without counts."""
    frequencies = counts / counts.sum().clamp_min(1)
    return torch.special.entr(frequencies).sum().exp()
