"""What the tests know of the original implementation: its names and settings, and an exact float64 version of its iteration."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from optvq_hf import OptVQConfig, OptVQModel


PAPER = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore"}
NORMALIZATION = {"all": "zscore", "dim": "sqrt_dim", "null": "none"}
LOSS_TYPE = {"l2": "l2", "l1": "l1", "ce": "cross_entropy"}

# Names of the convolutions in the order in which they run, and their places in our nn.Sequential.
PLAIN_CNN = {
    f"{part}.{name}": f"{part}.{index}"
    for part, change in (("encoder", "down"), ("decoder", "up"))
    for name, index in zip(("in_fc", f"{change}1", "conv1", f"{change}2", "conv2", "out_fc"), (0, 2, 3, 5, 6, 8))
}


def points(num_rows, num_codes, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num_rows, dim, generator=generator, dtype=dtype),
        torch.randn(num_codes, dim, generator=generator, dtype=dtype),
    )


def exact_iteration(
    cost, *, epsilon, iterations, normalization, dim=None, balance=1.0, potentials=None, target_marginals=None
):
    """The design's iteration, dense and in float64: (scores + potentials), the logarithm of the plan up to row constants."""
    cost = cost.double()
    num_rows, num_codes = cost.shape
    std = cost.std() if cost.numel() > 1 else torch.zeros((), dtype=torch.float64)
    scale = epsilon / {"zscore": std + 1e-6, "sqrt_dim": math.sqrt(dim or 1), "none": 1.0}[normalization]
    scores = -scale * cost
    target = torch.full((num_codes,), 1 / num_codes) if target_marginals is None else target_marginals
    log_target = (target.double() / target.double().sum()).log()
    rounds = iterations
    if potentials is not None:
        potentials = potentials.double()
    elif iterations:
        potentials, rounds = balance * (log_target - scores.logsumexp(0)), iterations - 1
    else:
        potentials = torch.zeros(num_codes, dtype=torch.float64)
    for _ in range(rounds):
        log_mass = (scores + potentials).log_softmax(1).logsumexp(0) - math.log(num_rows)
        potentials = potentials + balance * (log_target - log_mass)
    return scores + potentials


def margins(log_plan):
    top = log_plan.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def quantizer_arguments(kwargs: dict) -> dict:
    """Keyword arguments of OptVQQuantizer for those of the original."""
    return {
        "codebook_size": kwargs["n_e"],
        "dim": kwargs["e_dim"],
        "num_heads": kwargs.get("num_head", 1),
        "epsilon": kwargs.get("epsilon", 10.0),
        "iterations": kwargs.get("n_iters", 5),
        "normalization": NORMALIZATION[kwargs.get("normalize_mode", "all")],
        "use_projection": kwargs.get("use_proj", True),
        "loss_type": LOSS_TYPE[kwargs["loss_q_type"]],
        "codebook_weight": kwargs["beta"],
    }


def load_plain_cnn(folder: Path) -> OptVQModel:
    """An OptVQModel with the weights of a plain CNN of the original, at inference as the original: Sinkhorn on the batch."""
    reference = json.loads((folder / "config.json").read_text())
    quantize = quantizer_arguments(reference["quantize"])
    config = OptVQConfig(
        image_size=32,
        num_channels=reference["encoder"]["in_dim"],
        backbone="plain_cnn",
        codebook_size=quantize["codebook_size"],
        codebook_dim=quantize["dim"],
        num_codebook_heads=quantize["num_heads"],
        codebook_loss_type=quantize["loss_type"],
        inference_assignment="sinkhorn" if reference["quantize_type"] == "optvq" else "nearest",
    )
    model = OptVQModel(config).eval()
    state = {plain_cnn_name(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {
        f"quantizer.{name}" for name in ("potentials", "cost_scale", "num_updates", "last_potentials")
    }
    return model


def plain_cnn_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    module = PLAIN_CNN.get(module, module)
    return f"{module}.{kind}".replace("quantize.", "quantizer.").replace(".proj.", ".projection.")
