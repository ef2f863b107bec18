import pytest
import torch
from torch import nn

from optvq_hf import OptVQConfig, OptVQModel
from optvq_hf.training.optimization import make_optimizer, make_schedule


def test_only_convolution_and_linear_weights_decay():
    config = OptVQConfig(image_size=32, base_channels=32, channel_multiplier=(1,), num_res_blocks=1, codebook_size=16)
    model = OptVQModel(config)
    decayed, others = make_optimizer(model, 1e-3, 0.05).param_groups
    assert decayed["weight_decay"] == 0.05 and others["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    undecayed = {names[id(p)] for p in others["params"]}
    assert "quantizer.embedding.weight" in undecayed and "encoder.norm_out.weight" in undecayed
    assert all(name.endswith("bias") or "norm" in name or "embedding" in name for name in undecayed)
    assert "quantizer.projection.weight" in {names[id(p)] for p in decayed["params"]}


def test_frozen_parameters_are_left_out():
    config = OptVQConfig(image_size=32, backbone="plain_cnn", codebook_dim=8, codebook_size=16, freeze_codebook=True)
    model = OptVQModel(config)
    optimized = {id(p) for group in make_optimizer(model, 1e-3, 0.05).param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}
    assert not optimized & {id(p) for p in model.quantizer.parameters()}


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4, 10, 100, 101, 1000])
def test_one_cycle_of_any_length(total_steps):
    """Torch's schedule divides by zero at 100 steps with a warm-up of 1 %."""
    layer = nn.Linear(2, 2)
    optimizer = make_optimizer(layer, 1e-2, 0.0)
    schedule = make_schedule(optimizer, total_steps, 0.01)
    rates = []
    for _ in range(total_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) <= 1e-2 + 1e-12
    assert 0.85 <= optimizer.param_groups[0]["betas"][0] <= 0.95 and optimizer.param_groups[0]["betas"][1] == 0.99
    if total_steps >= 10:
        peak = rates.index(max(rates))
        assert peak <= max(1, total_steps * 0.01) and rates[peak] > 0.99e-2
        assert rates[-1] < 1e-3 and all(torch.tensor(rates[peak:]).diff() <= 0)
