"""Checks of what the solver and the row-by-row assignments are given: every wrong value is one line, and none passes."""

import math
import sys
from numbers import Integral, Rational, Real
from typing import Any

import torch

from .costs import Cost, Points, points_of
from .distances import double_dtype, working_dtype


NORMALIZATIONS = ("zscore", "robust", "sqrt_dim", "none")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---- features, codes, costs ------------------------------------------------------------------------------------------


def prepare(features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the working dtype, after [`check_shapes`]. Raises ValueError for NaN, inf, or values whose squares overflow."""
    dtype = working_dtype(features, codebook)
    features, codebook = features.to(dtype), codebook.to(dtype)
    check_all_finite({"features": features, "codebook": codebook})
    return features, codebook


def prepare_with_potentials(
    features: torch.Tensor,
    codebook: torch.Tensor,
    potentials: torch.Tensor,
    scale: torch.Tensor | float,
    cost: Cost = "euclidean",
) -> tuple[Points, torch.Tensor, torch.Tensor | float]:
    """The points of a cost, the potentials, and the scale of what is between the points, all checked.

    In float64 if the scale is too much for float32.
    """
    features, codebook = prepare(features, codebook)
    value = check_scale(scale, features)
    points = points_of(features, codebook, cost)
    if value and not is_in_range(value * points.unit, codebook, "scale"):
        points = points_of(features.double(), codebook.double(), cost)
    if points.unit != 1:
        scale = torch.as_tensor(scale, dtype=double_dtype(codebook.device)) * points.unit
    return points, check_potentials(potentials, points.codebook), scale


def check_shapes(features: torch.Tensor, codebook: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless they are float (N, d) and (K, d) with d > 0 and K > 0, on the same device."""
    check_tensor(features, "features")
    check_tensor(codebook, "codebook")
    if features.ndim != 2 or codebook.ndim != 2 or features.shape[1] != codebook.shape[1]:
        raise ValueError(
            "features must be (N, d) and codebook (K, d) with the same d, "
            f"got {tuple(features.shape)} and {tuple(codebook.shape)}"
        )
    if len(codebook) == 0:
        raise ValueError("codebook must hold at least one code, got none")
    if features.shape[1] == 0:
        raise ValueError("features and codes must have at least one entry, got width 0")
    if features.device != codebook.device:
        raise ValueError(f"features and codebook are on different devices: {features.device}, {codebook.device}")
    if not (features.dtype in DTYPES and codebook.dtype in DTYPES):
        raise ValueError(
            f"features and codebook must be floating point of 16 to 64 bits, got {features.dtype} and {codebook.dtype}"
        )


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises ValueError for NaN, inf, and values whose squares overflow in the tensor's dtype.

    Without data there is nothing to check.
    """
    check_all_finite({name: tensor})


def check_all_finite(tensors: dict[str, torch.Tensor]) -> None:
    """[`check_finite`] for several tensors by name, for which the host waits once."""
    tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta and tensor.numel() > 0}
    if torch.compiler.is_compiling() or not tensors:
        return
    all_largest = torch.stack([torch.stack(tensor.aminmax()).abs().max() for tensor in tensors.values()]).tolist()
    for (name, tensor), largest in zip(tensors.items(), all_largest):  # NaN if there is one
        if not math.isfinite(largest):
            raise ValueError(f"found NaN or inf in {name}")
        limit = math.sqrt(torch.finfo(tensor.dtype).max / (64 * max(tensor.shape[-1], 1)))
        if largest > limit:
            raise ValueError(f"{name} are too large for {tensor.dtype}: up to {largest:.1e}, the limit is {limit:.1e}")


def check_values(tensor: torch.Tensor, name: str, limit: float = math.inf) -> None:
    """Raises ValueError for NaN, inf, and values beyond the limit of pixel values. Compiled code does not look."""
    if torch.compiler.is_compiling() or tensor.is_meta or tensor.numel() == 0:
        return
    largest = torch.stack(tensor.detach().aminmax()).abs().max().item()  # NaN if there is one
    if not math.isfinite(largest):
        raise ValueError(f"found NaN or inf in {name}")
    if largest > limit:
        raise ValueError(f"{name} must lie in [-1, 1] (use OptVQImageProcessor), got values up to {largest:g}")


def check_tensor(value: Any, name: str) -> None:
    if not torch.is_tensor(value):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be dense, got {value.layout}")


# ---- potentials, scales, marginals -----------------------------------------------------------------------------------


def check_potentials(potentials: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(K,) in the working dtype. Raises TypeError or ValueError for anything but finite floats, one for each code."""
    check_tensor(potentials, "potentials")
    if potentials.shape != codebook.shape[:1]:
        raise ValueError(f"potentials must have one entry per code, ({len(codebook)},), got {tuple(potentials.shape)}")
    if potentials.dtype not in DTYPES:
        raise ValueError(f"potentials must be floating point, got {potentials.dtype}")
    if potentials.device != codebook.device:
        raise ValueError(f"potentials and codebook are on different devices: {potentials.device}, {codebook.device}")
    check_potentials_range(potentials, codebook.dtype)
    return potentials.to(codebook.dtype)


def check_potentials_range(potentials: torch.Tensor, dtype: torch.dtype, name: str = "potentials") -> None:
    """Raises ValueError for NaN, inf, and potentials so large that sums with scores could overflow in this dtype."""
    if torch.compiler.is_compiling() or potentials.is_meta or potentials.numel() == 0:
        return
    largest, limit = torch.stack(potentials.aminmax()).abs().max().item(), torch.finfo(dtype).max ** 0.75
    if not math.isfinite(largest):
        raise ValueError(f"found NaN or inf in {name}")
    if largest > limit:
        raise ValueError(f"{name} are too large for {dtype}: up to {largest:.1e}, the limit is {limit:.1e}")


def check_scale(scale: torch.Tensor | float, features: torch.Tensor) -> float | None:
    """A stored scale as a number; None while compiling, and for features without data, when it has no value.

    Raises TypeError or ValueError unless it is one finite number, 0 or more.
    """
    if torch.is_tensor(scale):
        if (
            scale.numel() != 1
            or scale.is_complex()
            or scale.dtype == torch.bool
            or (scale.is_meta and not features.is_meta)
        ):
            raise ValueError(f"scale must be one number, got {tuple(scale.shape)}, {scale.dtype}, {scale.device}")
    elif not torch.compiler.is_compiling():
        check_number(scale, "scale")
    if torch.compiler.is_compiling() or features.is_meta:
        return None
    value = float(scale)
    if not 0 <= value < math.inf:
        raise ValueError(f"scale must be finite and 0 or greater, got {value}")
    return value


def is_in_range(scale: float, like: torch.Tensor, name: str) -> bool:
    """Whether neither scores s D nor potentials over s overflow in a tensor's dtype, nor squares underflow that s makes matter.

    Distances and potentials reach the square root of the largest number, so that 3/8 of the exponents are left to s.

    Raises:
        ValueError: If float64 does not hold them either, or the device has none. `name` tells what made the scale.
    """
    for dtype in (like.dtype, double_dtype(like.device)):
        limit = torch.finfo(dtype).max ** 0.375
        if 1 / limit <= scale <= limit:
            return dtype == like.dtype
    raise ValueError(f"{name} is too small or too large: distances are multiplied by {scale:.1e}")


def log_target(marginals: torch.Tensor | None, codebook: torch.Tensor) -> torch.Tensor:
    """(K,) in float64: the logarithm of the share of the mass that each code is to receive.

    Raises:
        TypeError: For something that is not a tensor.
        ValueError: For a wrong shape, and for numbers that are not finite and greater than 0.
    """
    num_codes, dtype = len(codebook), double_dtype(codebook.device)
    if marginals is None:
        return codebook.new_full((num_codes,), -math.log(num_codes), dtype=dtype)
    check_tensor(marginals, "target_marginals")
    if marginals.shape != (num_codes,):
        raise ValueError(f"target_marginals must have one entry per code, ({num_codes},), got {tuple(marginals.shape)}")
    if marginals.is_complex() or marginals.is_meta or not (marginals.isfinite() & (marginals > 0)).all():
        raise ValueError("target_marginals must be finite and greater than 0")
    return marginals.to(codebook.device, dtype).log().log_softmax(dim=0)


# ---- settings --------------------------------------------------------------------------------------------------------


def check_settings(epsilon: float, iterations: int, normalization: str, balance: float = 1.0) -> None:
    """Raises TypeError or ValueError for a setting of [`~sinkhorn.sinkhorn_assign`] out of its range."""
    for name, value in (("epsilon", epsilon), ("iterations", iterations), ("balance", balance)):
        check_number(value, name)
    if not 0 < float(epsilon) <= sys.float_info.max:
        raise ValueError(f"epsilon must be finite and greater than 0, got {epsilon}")
    if not (0 <= iterations < math.inf) or iterations != int(iterations):
        raise ValueError(f"iterations must be a whole number, 0 or more, got {iterations}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must lie in [0, 1], got {balance}")


def check_limits(tolerance: float | None, memory_budget: int | None) -> None:
    """The same for what may be None."""
    for name, value in (("tolerance", tolerance), ("memory_budget", memory_budget)):
        if value is None:
            continue
        check_number(value, name)
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or greater, got {value}")


def check_number(value: Any, name: str) -> None:
    """Raises TypeError unless it is an integer or a float of Python or numpy; ValueError for one beyond every float."""
    is_fraction = isinstance(value, Rational) and not isinstance(value, Integral)
    if isinstance(value, bool) or is_fraction or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name} must be finite, got an integer of {value.bit_length()} bits")
