"""What solver, quantizer and models cost in time and memory."""

import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from parts import Rows, Settings, one_line, part, peak_memory, side_by_side

from optvq_hf import OptVQConfig, OptVQModel, OptVQQuantizer
from optvq_hf.sinkhorn import nearest_assign, sinkhorn_assign
from optvq_hf.training.optimization import make_optimizer


PAPER = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore"}


@part("solver", "sinkhorn_assign, nearest_assign and torch.cdist + argmin at four sizes, with peak memory")
def solver(settings: Settings) -> Rows:
    cases = [(16384, 1024, 8), (16384, 4096, 4), (32768, 16384, 8), (65536, 16384, 64)]
    rows = []
    for num_rows, num_codes, width in cases if settings.is_gpu else [(512, 128, 8), (512, 256, 4)]:
        z, c = points(settings.device, num_rows, num_codes, width)
        methods = {
            "cdist + argmin": lambda z=z, c=c: torch.cdist(z, c).argmin(dim=1),
            "sinkhorn_assign, torch, nothing kept": partial(
                sinkhorn_assign, z, c, **PAPER, memory_budget=0, solver="torch"
            ),
        }
        for name in ("auto", "torch", "fused") if settings.is_gpu else ("auto", "torch"):
            methods[f"sinkhorn_assign, {name}"] = partial(sinkhorn_assign, z, c, **PAPER, solver=name)
            methods[f"nearest_assign, {name}"] = partial(nearest_assign, z, c, solver=name)
        times = side_by_side(settings.device, methods, settings.turns)
        for name, time_of_one in times.items():
            rows.append(
                {
                    "N": num_rows,
                    "K": num_codes,
                    "d": width,
                    "method": name,
                    "ms": time_of_one,
                    "to cdist + argmin": time_of_one / times["cdist + argmin"],
                    "peak memory (MiB)": peak_memory(settings.device, methods[name]),
                }
            )
    return rows


def points(device: torch.device, num_rows: int, num_codes: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features, codebook = (torch.randn(number, width, generator=generator) for number in (num_rows, num_codes))
    return features.to(device), codebook.to(device)


@part("quantizer", "a training step of the quantizer (forward, backward, AdamW) with each assignment")
def quantizer(settings: Settings) -> Rows:
    shape = (64, 256, 16, 16) if settings.is_gpu else (4, 32, 8, 8)
    num_codes = 16384 if settings.is_gpu else 256
    features = torch.randn(shape, device=settings.device)
    steps = {}
    for assignment in ("nearest", "sinkhorn", "sample"):
        for warm_start in (False, True) if assignment == "sinkhorn" else (False,):
            module = OptVQQuantizer(
                num_codes, shape[1], num_heads=4, training_assignment=assignment, warm_start=warm_start
            ).to(settings.device)
            optimizer = make_optimizer(module, 1e-4, 0.0)
            name = f"{assignment}{', warm start' if warm_start else ''}"
            steps[name] = partial(train_step, module, features, optimizer, None)
    times = side_by_side(settings.device, steps, settings.turns)
    return [
        {
            "assignment": name,
            "input": " x ".join(map(str, shape)),
            "codes": num_codes,
            "ms": ms,
            "peak memory (MiB)": peak_memory(settings.device, steps[name]),
        }
        for name, ms in times.items()
    ]


def train_step(
    module: torch.nn.Module, inputs: torch.Tensor, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None
) -> None:
    """Forward, backward and update, under autocast to `dtype` unless it is None."""
    with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype is not None):
        output = module(inputs)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()


PLAIN = {"backbone": "plain_cnn", "image_size": 32, "codebook_size": 1024, "codebook_dim": 8, "num_codebook_heads": 4}
SMALL = {"image_size": 16, "base_channels": 32, "channel_multiplier": (1, 2), "num_res_blocks": 1, "codebook_size": 64}
VARIANTS = {  # dtype of autocast, memory format, whether products are TF32
    "float32": (None, torch.contiguous_format, "ieee"),
    "TF32": (None, torch.contiguous_format, "tf32"),
    "bf16 autocast": (torch.bfloat16, torch.contiguous_format, "ieee"),
    "bf16 autocast, channels_last": (torch.bfloat16, torch.channels_last, "ieee"),
}


def models(settings: Settings) -> dict[str, tuple[OptVQConfig, int]]:
    """Configuration and batch size of each."""
    if not settings.is_gpu:
        small = {**SMALL, "latent_channels": 32, "codebook_dim": 32}
        return {"VQGAN 16 px": (OptVQConfig(**small), 2), "plain CNN 32 px": (OptVQConfig(**PLAIN), 2)}
    return {"VQGAN 256 px": (OptVQConfig(), 16), "plain CNN 32 px": (OptVQConfig(**PLAIN), 256)}


def make_step(settings: Settings, config: OptVQConfig, batch_size: int, variant: str, compiled: bool) -> Callable:
    dtype, memory_format, precision = VARIANTS[variant]
    torch.manual_seed(0)
    model = OptVQModel(config).to(settings.device, memory_format=memory_format).train()
    if compiled:
        for module in (model.encoder, model.decoder):
            module.compile(backend="inductor" if settings.is_gpu else "aot_eager")
    pixels = make_pixels(settings, config, batch_size).to(memory_format=memory_format)
    optimizer = make_optimizer(model, 1e-4, 0.05)

    def step() -> None:
        backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = precision
        try:
            train_step(model, pixels, optimizer, dtype)
        finally:
            for backend, value in zip(backends, before):
                backend.fp32_precision = value

    return step


def make_pixels(settings: Settings, config: OptVQConfig, batch_size: int) -> torch.Tensor:
    shape = (batch_size, config.num_channels, config.image_size, config.image_size)
    return torch.rand(shape, device=settings.device) * 2 - 1


def measure_steps(settings: Settings, variants: list[str], compiled: bool = False) -> Rows:
    """One row per model and variant; a variant that fails has its error."""
    rows = []
    of_models = list(reversed(models(settings).items()))  # the faster first
    for name, (config, batch_size) in of_models if settings.is_gpu or not compiled else of_models[:1]:
        for variant in variants:
            row = {"model": name, "variant": f"{variant}{', compiled' if compiled else ''}", "batch": batch_size}
            try:
                if settings.left < 0:
                    raise TimeoutError("skipped, the time is over")
                step = make_step(settings, config, batch_size, variant, compiled)
                start = time.perf_counter()
                step()
                row["first step (s)"] = time.perf_counter() - start
                [ms] = side_by_side(settings.device, {"": step}, settings.turns).values()
                row |= {"ms": ms, "images/s": 1e3 * batch_size / ms}
                row["peak memory (MiB)"] = peak_memory(settings.device, step)
            except Exception as error:
                row["error"] = one_line(error)
            rows.append(row)
    return rows


@part(
    "encoding",
    "images/s of encode in evaluation mode by batch size, in float32, under bf16 autocast, and of a model in bf16",
)
@torch.no_grad()
def encoding(settings: Settings) -> Rows:
    rows = []
    for name, (config, batch_size) in models(settings).items():
        torch.manual_seed(0)
        model = OptVQModel(config).to(settings.device).eval()
        in_bf16 = copy.deepcopy(model).to(torch.bfloat16)
        for size in (1, 8, 4 * batch_size) if settings.is_gpu else (1, batch_size):
            pixels = make_pixels(settings, config, size)

            def encode(dtype=None, model=model, pixels=pixels):
                with torch.autocast(settings.device.type, dtype=dtype, enabled=dtype is not None):
                    model.encode(pixels, return_loss=False)

            # Convolutions of torch are TF32 by default, where a GPU has that.
            functions = {"float32, TF32 convolutions": encode, "bf16 autocast": partial(encode, torch.bfloat16)}
            functions["bf16 model"] = partial(encode, model=in_bf16)
            for variant, ms in side_by_side(settings.device, functions, settings.turns).items():
                rows.append({"model": name, "variant": variant, "batch": size, "ms": ms, "images/s": 1e3 * size / ms})
    return rows


@part("model", "a training step of the default VQGAN and of the plain CNN: float32, TF32, bf16 autocast, channels_last")
def model_steps(settings: Settings) -> Rows:
    return measure_steps(settings, list(VARIANTS) if settings.is_gpu else ["float32", "bf16 autocast"])


@part("compiled model", "the training step again with encoder and decoder compiled")
def compiled_steps(settings: Settings) -> Rows:
    return measure_steps(settings, ["bf16 autocast, channels_last"] if settings.is_gpu else ["float32"], compiled=True)
