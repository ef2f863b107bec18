"""200 generated wrong inputs to the public doors: each is refused with one line of our own that says what was wrong."""

import io
import math
import random
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import pipeline

import optvq_hf
from builders import make_untrained, plain_config
from optvq_hf import OptVQConfig, OptVQImageProcessor, OptVQQuantizer
from optvq_hf.sinkhorn import (
    nearest_assign,
    plan_rows,
    potentials_assign,
    sample_assign,
    sinkhorn_assign,
    sinkhorn_plan,
)


NUMBER = 200
PACKAGE = Path(optvq_hf.__file__).parent
NOT_TENSORS = [None, "x", 3, 1.5, [1.0, 2.0], {"a": 1}, np.zeros((2, 8))]
SETTINGS = {"epsilon": 10.0, "iterations": 3, "normalization": "zscore"}
WRONG_SETTINGS = [
    *({"epsilon": value} for value in (0, -1.0, math.nan, math.inf, "10", None, [10.0])),
    *({"iterations": value} for value in (-1, 2.5, math.nan, "5", None)),
    *({"normalization": value} for value in ("max", "", None, 3)),
]
WRONG_OPTIONS = [
    *({"balance": value} for value in (-0.1, 1.5, math.nan, "1", None)),
    *({"potentials": value} for value in (torch.zeros(5), torch.full((6,), math.nan), [0.0] * 6)),
    *({"target_marginals": value} for value in (torch.zeros(6), torch.ones(5), -torch.ones(6), "even")),
    *({"memory_budget": value} for value in (-1, math.nan, "1 GB")),
    *({"tolerance": value} for value in (-1, math.nan, "small")),
]
WRONG_PICTURES = [
    None,
    3,
    {"picture": 1},
    object(),
    "no_such_file.png",
    "",
    b"not a picture",
    io.BytesIO(b"\x89PNG\r\n\x1a\n broken"),
    Image.new("F", (40, 40)),
    Image.fromarray(np.full((40, 40), 200, np.int32)),
    Image.fromarray(np.full((40, 40), -5, np.int32)),
    Image.fromarray(np.full((40, 40), 70000, np.int32)),
    *(np.zeros((40, 40, 3), dtype) for dtype in (np.float32, np.float64, np.uint16, np.int64, bool)),
    *(torch.zeros((3, 40, 40), dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool)),
    *(np.zeros(shape, np.uint8) for shape in [(40,), (0, 40, 3), (40, 40, 5), (28, 28, 28), (2, 2, 40, 40, 3)]),
]


def one_of(*calls: partial) -> partial:
    return random.choice(calls)


def spoiled_floats(*shape: int) -> object:
    """Something that cannot stand for a float tensor of this shape."""
    x = torch.randn(shape)
    kind = random.choice(["type", "dtype", "value", "more axes", "fewer axes"])
    if kind == "type":
        return random.choice(NOT_TENSORS)
    if kind == "dtype":
        return torch.zeros(shape, dtype=random.choice([torch.int64, torch.uint8, torch.bool, torch.complex64]))
    if kind == "value":
        x.view(-1)[random.randrange(x.numel())] = random.choice([math.nan, math.inf, -math.inf])
        return x
    return x[None, None, None, None] if kind == "more axes" else x.flatten()[0]


def spoiled_integers(integers: torch.Tensor, size: int) -> object:
    """Something that cannot stand for these integers in [0, size)."""
    kind = random.choice(["type", "dtype", "value", "more axes", "fewer axes"])
    if kind == "type":
        return random.choice(NOT_TENSORS)
    if kind == "dtype":
        return integers.to(random.choice([torch.float32, torch.bool, torch.complex64]))
    if kind == "value":
        integers = integers.clone()
        integers.view(-1)[random.randrange(integers.numel())] = random.choice([size, size + 10**6, -2, 2**62])
        return integers
    return integers[None, None, None, None] if kind == "more axes" else integers.flatten()[0]


def of_the_solver() -> partial:
    x, codebook, potentials = torch.randn(20, 4), torch.randn(6, 4), torch.zeros(6)
    by_potentials = random.choice([potentials_assign, sample_assign, plan_rows])
    return one_of(
        partial(sinkhorn_assign, spoiled_floats(20, 4), codebook, **SETTINGS),
        partial(sinkhorn_assign, x, spoiled_floats(6, 4), **SETTINGS),
        partial(sinkhorn_assign, x[:, :3], codebook, **SETTINGS),
        partial(sinkhorn_assign, x, codebook[:0], **SETTINGS),
        partial(sinkhorn_assign, x, codebook, **{**SETTINGS, **random.choice(WRONG_SETTINGS)}),
        partial(sinkhorn_assign, x, codebook, **SETTINGS, **random.choice(WRONG_OPTIONS)),
        partial(sinkhorn_plan, spoiled_floats(5, 6), **SETTINGS),
        partial(sinkhorn_plan, torch.rand(5, 6), **{**SETTINGS, **random.choice(WRONG_SETTINGS)}),
        partial(sinkhorn_plan, torch.rand(5, 6), **{**SETTINGS, "normalization": "sqrt_dim"}),
        partial(nearest_assign, spoiled_floats(20, 4), codebook),
        partial(by_potentials, spoiled_floats(20, 4), codebook, potentials, 1.0),
        partial(by_potentials, x, spoiled_floats(6, 4), potentials, 1.0),
        partial(by_potentials, x, codebook, random.choice([torch.zeros(7), torch.full((6,), math.inf), None]), 1.0),
        partial(by_potentials, x, codebook, potentials, random.choice([-1.0, math.nan, math.inf, "1", torch.ones(2)])),
    )


def of_the_quantizer() -> partial:
    quantizer = OptVQQuantizer(codebook_size=16, dim=8, num_heads=2).train(random.random() < 0.5)
    masks = [torch.ones(3, 5), torch.ones(5, 3, dtype=torch.bool), "all", torch.ones(3, 5, 8).bool()]
    wrong = [
        {name: value} for name in ("codebook_size", "dim", "num_heads") for value in (0, -3, math.nan, "many", None)
    ]
    wrong += [{"epsilon": -1.0}, {"balance": 7}, {"loss_type": "huber"}, {"ema_decay": 1.0}, {"channels_first": "yes"}]
    return one_of(
        partial(quantizer, spoiled_floats(*random.choice([(6, 8), (3, 5, 8), (3, 8, 4, 4), (2, 8, 2, 3, 3)]))),
        partial(quantizer, torch.randn(3, 5, 9)),
        partial(quantizer, torch.randn(3, 5, 8), assignment=random.choice(["best", 3, ["nearest"]])),
        partial(quantizer, torch.randn(3, 5, 8), mask=random.choice(masks)),
        partial(quantizer.lookup, spoiled_integers(torch.zeros(3, 2, 4, 4, dtype=torch.int64), 16)),
        partial(OptVQQuantizer, **{"dim": 8, **random.choice(wrong)}),
    )


def of_the_model(model) -> partial:
    pictures, codes = torch.rand(2, 3, 32, 32), torch.zeros(2, 2, 8, 8, dtype=torch.int64)
    ids = torch.tensor([0, 128]).repeat(1, 64)
    wrong = [{"codebook_size": value} for value in (0, -1, 2.5, "8", None)]
    wrong += [{"sinkhorn_epsilon": value} for value in (0, math.inf, math.nan, "10")]
    wrong += [{"codebok_size": 8}, {"image_size": 33}, {"num_codebook_heads": 3}, {"backbone": "vit"}, {"dropout": 2.0}]
    return one_of(
        partial(random.choice([model, model.encode]), spoiled_floats(2, 3, 32, 32)),
        partial(random.choice([model, model.encode]), torch.rand(2, 3, random.choice([30, 31, 33]), 32)),
        partial(random.choice([model, model.encode]), pictures[:, :1]),
        partial(model.encode, pictures, assignment=random.choice(["best", 3])),
        partial(model.decode, codes=spoiled_integers(codes, 128)),
        partial(model.decode, spoiled_floats(2, 8, 8, 8)),
        partial(model.decode, torch.zeros(2, 8, 8, 8), codes),
        partial(model.decode),
        partial(model.to_token_ids, spoiled_integers(codes, 128)),
        partial(model.from_token_ids, spoiled_integers(ids, 256)),
        partial(model.from_token_ids, ids, random.choice([-1, 0.5, 10**6])),
        partial(model.from_token_ids, ids, grid=random.choice([(8,), 8, (7, 8), "8x8"])),
        partial(OptVQConfig, **random.choice(wrong)),
    )


def of_pictures(processor, pipelines) -> partial:
    picture, good = random.choice(WRONG_PICTURES), Image.new("RGB", (40, 40))
    return one_of(
        partial(processor, picture, return_tensors="pt"),
        partial(processor, [good, picture], return_tensors="pt"),
        partial(random.choice(pipelines), picture),
        partial(random.choice(pipelines), [good, picture]),
        partial(random.choice(pipelines), good, assignment="best"),
        partial(processor.postprocess, random.choice([torch.zeros(3, 8, 8), torch.zeros(1, 2, 8, 8), None, "x"])),
        partial(processor, good, num_channels=random.choice([0, 2, 4, "RGB"]), return_tensors="pt"),
    )


def wrong_calls() -> Iterator[partial]:
    processor = OptVQImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model = make_untrained(plain_config())
    tasks = ("image-tokenization", "image-reconstruction")
    pipelines = [pipeline(task, model=model, image_processor=processor) for task in tasks]
    while True:
        yield of_the_solver()
        yield of_the_quantizer()
        yield of_the_model(model)
        yield of_pictures(processor, pipelines)


def test_wrong_inputs():
    random.seed(0)
    torch.manual_seed(0)
    faults = []
    for number, call in zip(range(NUMBER), wrong_calls()):
        name = f"{number}: {getattr(call.func, '__name__', type(call.func).__name__)}"
        given = ", ".join([*map(describe, call.args), *(f"{k}={describe(v)}" for k, v in call.keywords.items())])
        try:
            call()
            faults.append(f"{name}({given}) is accepted")
        except (ValueError, TypeError, IndexError, OSError, StrictDataclassError) as error:
            last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            is_ours = PACKAGE in last.parents or isinstance(error, StrictDataclassError)
            if not (is_ours and 0 < len(str(error)) < 400):
                faults.append(f"{name}({given}): {type(error).__name__} of {last.name}: {error}")
        except Exception as error:  # noqa: BLE001  the stack traces that this test looks for
            faults.append(f"{name}({given}): {type(error).__name__}: {error}")
    if faults:
        pytest.fail("\n".join(faults))


def describe(value: object) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{value.dtype} {tuple(value.shape)}"
    return repr(value)[:60]
