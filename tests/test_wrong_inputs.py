"""200 generated wrong inputs to every public door: each is an error that says what was wrong, in one line of our own."""

import math
import random
import traceback
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


NUMBER = 1500
PACKAGE = Path(optvq_hf.__file__).parent
NOT_TENSORS = [None, "x", 3, 1.5, [1.0, 2.0], {"a": 1}, np.zeros((2, 8))]
NOT_FLOATS = [torch.int64, torch.uint8, torch.bool, torch.complex64]


def spoil_floats(random: random.Random, x: torch.Tensor):
    """Something that cannot stand for a float tensor of this shape."""
    kind = random.choice(["type", "dtype", "nan", "inf", "huge", "more", "fewer"])
    if kind == "type":
        return random.choice(NOT_TENSORS)
    if kind == "dtype":
        return torch.zeros(x.shape, dtype=random.choice(NOT_FLOATS))
    if kind in ("nan", "inf", "huge"):
        x = x.clone()
        x.view(-1)[random.randrange(x.numel())] = {"nan": math.nan, "inf": -math.inf, "huge": 3e38}[kind]
        return x
    return x[None, None, None, None] if kind == "more" else x.flatten()[0]


def spoil_integers(random: random.Random, codes: torch.Tensor, size: int):
    kind = random.choice(["type", "dtype", "large", "negative", "more", "fewer"])
    if kind == "type":
        return random.choice(NOT_TENSORS)
    if kind == "dtype":
        return codes.to(random.choice([torch.float32, torch.bool, torch.complex64]))
    if kind in ("large", "negative"):
        codes = codes.clone()
        codes.view(-1)[random.randrange(codes.numel())] = size + random.randrange(1000) if kind == "large" else -2
        return codes
    return codes[None, None, None, None] if kind == "more" else codes.flatten()[0]


WRONG_NUMBERS = {
    "epsilon": [0, -1.0, math.nan, math.inf, "10", None, [10.0]],
    "iterations": [-1, 2.5, math.nan, "5", None],
    "balance": [-0.1, 1.5, math.nan, "1", None],
    "normalization": ["max", "", None, 3],
}


def wrong_calls(random: random.Random, model, processor, pipelines):
    """Endless wrong calls: a name, and a function that makes the call."""
    x, codebook = torch.randn(20, 4), torch.randn(6, 4)
    potentials = torch.zeros(6)
    settings = {"epsilon": 10.0, "iterations": 3, "normalization": "zscore"}
    pictures = torch.rand(2, 3, 32, 32)
    codes = torch.zeros(2, 2, 8, 8, dtype=torch.int64)
    ids = torch.tensor([0, 128]).repeat(1, 64)

    def wrong_setting(names):
        name = random.choice(names)
        return {name: random.choice(WRONG_NUMBERS[name])}

    def solver():
        wrong = wrong_setting(list(WRONG_NUMBERS))
        return random.choice(
            [
                (
                    "sinkhorn_assign features",
                    lambda a=spoil_floats(random, x): sinkhorn_assign(a, codebook, **settings),
                ),
                (
                    "sinkhorn_assign codebook",
                    lambda a=spoil_floats(random, codebook): sinkhorn_assign(x, a, **settings),
                ),
                ("sinkhorn_assign width", lambda: sinkhorn_assign(x[:, :3], codebook, **settings)),
                ("sinkhorn_assign no codes", lambda: sinkhorn_assign(x, codebook[:0], **settings)),
                (f"sinkhorn_assign {wrong}", lambda: sinkhorn_assign(x, codebook, **{**settings, **wrong})),
                (
                    "sinkhorn_assign potentials",
                    lambda a=random.choice([torch.zeros(5), torch.full((6,), math.nan), [0.0] * 6]): sinkhorn_assign(
                        x, codebook, potentials=a, **settings
                    ),
                ),
                (
                    "sinkhorn_assign targets",
                    lambda a=random.choice([torch.zeros(6), torch.ones(5), -torch.ones(6), "even"]): sinkhorn_assign(
                        x, codebook, target_marginals=a, **settings
                    ),
                ),
                (
                    "sinkhorn_assign budget",
                    lambda a=random.choice([-1, 1.5, "1 GB"]): sinkhorn_assign(
                        x, codebook, memory_budget=a, **settings
                    ),
                ),
                ("nearest_assign", lambda a=spoil_floats(random, x): nearest_assign(a, codebook)),
                ("sinkhorn_plan", lambda a=spoil_floats(random, torch.rand(5, 6)): sinkhorn_plan(a, **settings)),
                (
                    "sinkhorn_plan dim",
                    lambda: sinkhorn_plan(torch.rand(5, 6), **{**settings, "normalization": "sqrt_dim"}),
                ),
                *(
                    (f.__name__, lambda a=arguments, f=f: f(*a))
                    for f in (potentials_assign, sample_assign, plan_rows)
                    for arguments in (
                        (spoil_floats(random, x), codebook, potentials, 1.0),
                        (x, spoil_floats(random, codebook), potentials, 1.0),
                        (x, codebook, random.choice([torch.zeros(7), torch.full((6,), math.inf), None]), 1.0),
                        (x, codebook, potentials, random.choice([-1.0, math.nan, math.inf, "1", torch.ones(2)])),
                    )
                ),
            ]
        )

    def quantizer():
        module = OptVQQuantizer(codebook_size=16, dim=8, num_heads=2).train(random.random() < 0.5)
        shape = random.choice([(6, 8), (3, 5, 8), (3, 8, 4, 4), (2, 8, 2, 3, 3)])
        of_codes = (3, 2, 4, 4)
        mask = random.choice([torch.ones(3, 5), torch.ones(5, 3, dtype=torch.bool), "all", torch.ones(3, 5, 8).bool()])
        field = random.choice(["codebook_size", "dim", "num_heads", "epsilon", "balance", "loss_type", "ema_decay"])
        return random.choice(
            [
                ("quantizer", lambda a=spoil_floats(random, torch.randn(shape)): module(a)),
                ("quantizer width", lambda: module(torch.randn(3, 5, 9))),
                (
                    "quantizer assignment",
                    lambda a=random.choice(["best", 3, ["nearest"]]): module(torch.randn(shape), a),
                ),
                ("quantizer mask", lambda: module(torch.randn(3, 5, 8), mask=mask)),
                (
                    "lookup",
                    lambda a=spoil_integers(random, torch.zeros(of_codes, dtype=torch.int64), 16): module.lookup(a),
                ),
                (
                    f"OptVQQuantizer {field}",
                    lambda a=random.choice([0, -3, math.nan, "many", None]): OptVQQuantizer(
                        **{"dim": 8, field: -1 if field in ("balance", "ema_decay") else a}
                    ),
                ),
            ]
        )

    def of_model():
        small = torch.rand(2, 3, random.choice([30, 31, 33]), 32)
        return random.choice(
            [
                ("encode", lambda a=spoil_floats(random, pictures): model.encode(a)),
                ("forward", lambda a=spoil_floats(random, pictures): model(a)),
                ("size", lambda: model.encode(small)),
                ("channels", lambda: model(pictures[:, :1])),
                ("encode assignment", lambda a=random.choice(["best", 3]): model.encode(pictures, assignment=a)),
                ("decode", lambda a=spoil_integers(random, codes, 128): model.decode(codes=a)),
                ("decode quantized", lambda a=spoil_floats(random, torch.randn(2, 8, 8, 8)): model.decode(a)),
                ("decode both", lambda: model.decode(torch.zeros(2, 8, 8, 8), codes)),
                ("decode nothing", lambda: model.decode()),
                ("to_token_ids", lambda a=spoil_integers(random, codes, 128): model.to_token_ids(a)),
                ("from_token_ids", lambda a=spoil_integers(random, ids, 256): model.from_token_ids(a)),
                ("from_token_ids first", lambda a=random.choice([-1, 0.5, 10**6]): model.from_token_ids(ids, a)),
                (
                    "from_token_ids grid",
                    lambda a=random.choice([(8,), 8, (7, 8), "8x8"]): model.from_token_ids(ids, grid=a),
                ),
                (
                    "OptVQConfig",
                    lambda a=random.choice([{"codebook_size": random.choice([0, -1, 2.5, "8", None])}, {"codebok_size": 8}, {"image_size": 33}, {"num_codebook_heads": 3}, {"backbone": "vit"}, {"sinkhorn_epsilon": random.choice([0, math.inf, math.nan, "10"])}]): (
                        OptVQConfig(**a)
                    ),
                ),
            ]
        )

    doors = [solver, quantizer, of_model]
    while True:
        yield random.choice(doors)()


@pytest.fixture(scope="module")
def model():
    return make_untrained(plain_config())


def test_wrong_inputs(model):
    processor = OptVQImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipelines = [
        pipeline(task, model=model, image_processor=processor)
        for task in ("image-tokenization", "image-reconstruction")
    ]
    calls = wrong_calls(random.Random(0), model, processor, pipelines)
    torch.manual_seed(0)
    faults = []
    for number in range(NUMBER):
        name, call = next(calls)
        try:
            call()
            faults.append(f"{number} {name}: accepted")
        except (ValueError, TypeError, IndexError, OSError, StrictDataclassError) as error:
            last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            is_ours = PACKAGE in last.parents or isinstance(error, StrictDataclassError)
            if not (is_ours and str(error) and len(str(error)) < 400):
                faults.append(f"{number} {name}: {type(error).__name__} of {last.name}: {error}")
        except Exception as error:  # noqa: BLE001  what this test looks for
            faults.append(f"{number} {name}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)
