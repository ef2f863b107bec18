"""AdamW with weight decay where it belongs, and the one-cycle schedule of the paper."""

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR


DECAYED_LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, beta2: float = 0.99
) -> torch.optim.AdamW:
    """AdamW; only weights of linear and convolution layers decay, neither biases nor norms nor the codebook."""
    decayed = [
        layer.weight for layer in model.modules() if isinstance(layer, DECAYED_LAYERS) and layer.weight.requires_grad
    ]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is weight for weight in decayed)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=(0.9, beta2))


def make_schedule(optimizer: torch.optim.Optimizer, peak: float, total_steps: int, warmup_ratio: float) -> OneCycleLR:
    """One cosine cycle: up to `peak` in the first steps, then down to nearly nothing.

    Adam's first beta goes the other way, from 0.95 to 0.85 and back, as is torch's default and happened in the original.

    OneCycleLR divides by the length of the warm-up minus one step, so a warm-up gets at least two steps, and a run of less
    than four is given the beginning of a cycle of four.
    """
    total_steps = max(total_steps, 4)
    warmup = max(warmup_ratio, 2 / total_steps)
    return OneCycleLR(optimizer, max_lr=peak, total_steps=total_steps, pct_start=warmup)
