"""What the tests know of the original implementation: its names and settings, and an exact float64 version of its iteration."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from optvq_hf import OptVQModel
from optvq_hf.publishing.conversion import LOSS_TYPES, NORMALIZATIONS, convert_config, convert_model


PAPER = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore"}


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
        "normalization": NORMALIZATIONS[kwargs.get("normalize_mode", "all")],
        "use_projection": kwargs.get("use_proj", True),
        "loss_type": LOSS_TYPES[kwargs["loss_q_type"]],
        "codebook_weight": kwargs["beta"],
    }


def load_reference_model(folder: Path) -> OptVQModel:
    """A model of the original, converted, at inference as the original: Sinkhorn on the batch."""
    config = convert_config(json.loads((folder / "config.json").read_text()), keep_batch_assignment=True)
    return convert_model(config, load_file(folder / "model.safetensors"))


def original_names(model, config):
    """Our names -> the original's, written down once more from its structure, so that the converter has something to meet."""
    names = {}
    last = len(config.channel_multiplier) - 1
    layers = {
        "encoder": ("in_fc", "down1", "conv1", "down2", "conv2", "out_fc"),
        "decoder": ("in_fc", "up1", "conv1", "up2", "conv2", "out_fc"),
    }
    projections = {"query": "q", "key": "k", "value": "v", "output": "proj_out"}
    for name in (name for name, _ in model.named_parameters()):
        words = name.split(".")
        if words[0] == "quantizer":
            words = ["quantize", *("proj" if word == "projection" else word for word in words[1:])]
        elif config.backbone == "plain_cnn" and words[0] in layers:
            words[1] = layers[words[0]][(0, 2, 3, 5, 6, 8).index(int(words[1]))]
        elif words[0] in ("encoder", "decoder") and words[1] == "stages":
            down = words[0] == "encoder"
            level = int(words[2]) if down else last - int(words[2])
            rest = words[3:]
            if rest[0] == "resample":
                rest[0] = "downsample" if down else "upsample"
            else:
                rest[0] = {"resnets": "block", "attentions": "attn"}[rest[0]]
                rest[2] = {"shortcut": "nin_shortcut", **projections}.get(rest[2], rest[2])
            words = [words[0], "down" if down else "up", str(level), *rest]
        elif words[1] == "mid":
            words[2] = {"resnet1": "block_1", "attention": "attn_1", "resnet2": "block_2"}[words[2]]
            words[3] = {"shortcut": "nin_shortcut", **projections}.get(words[3], words[3])
        names[name] = ".".join(words)
    return names
