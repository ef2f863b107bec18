"""Where the codebook begins, how its assignment changes, and dead codes."""

import pytest
import torch
from torch import nn

from optvq_hf import OptVQConfig, OptVQModel, OptVQQuantizer
from optvq_hf.commands.train import main
from optvq_hf.costs import COSTS
from optvq_hf.sinkhorn import nearest_assign
from optvq_hf.training.arguments import CodebookArguments
from optvq_hf.training.codebook import (
    follow_schedule,
    note_schedules,
    reseed,
    set_codebook,
    split_heads,
    start_codebook,
)
from optvq_hf.training.optimization import make_optimizer
from optvq_hf.training.trainer import StepResult
from optvq_hf.training.watching.recorder import Recorder
from training.runs import flags


def make(**fields):
    torch.manual_seed(0)
    fields = {"codebook_size": 64, "codebook_dim": 8, "num_codebook_heads": 2, "num_channels": 1, **fields}
    return OptVQModel(OptVQConfig(backbone="plain_cnn", image_size=32, **fields)).train()


def batches(number=4, size=16):
    torch.manual_seed(1)
    return [torch.rand(size, 1, 32, 32) * 2 - 1 for _ in range(number)]


def features_of(model):
    with torch.no_grad():
        latents = [model.eval().encode(pixels, assignment="nearest").latents for pixels in batches()]
    model.train()
    return torch.cat([split_heads(part, model.quantizer.head_dim) for part in latents])


def distance_to_nearest(points, others):
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values


@pytest.mark.parametrize("projected", [True, False])
def test_samples_are_features_of_any_head(projected):
    model = make(use_codebook_projection=projected)
    features = features_of(model)
    start_codebook(model, batches(), CodebookArguments(codebook_start="samples"), seed=0)
    assert distance_to_nearest(model.get_codebook().detach(), features).max() < 1e-5
    assert model.training and model.get_codebook().unique(dim=0).shape == (64, 4)


def test_kmeans_quantizes_better_than_samples_and_repeats():
    errors = {}
    for start in ("samples", "kmeans", "kmeans"):
        model = make()
        features = features_of(model)
        start_codebook(model, batches(), CodebookArguments(codebook_start=start), seed=0)
        codebook = model.get_codebook().detach()
        if start in errors:
            assert torch.equal(codebook, errors[start][1])
        error = (features - codebook[nearest_assign(features, codebook)]).square().mean()
        errors[start] = error, codebook
        assert model.quantizer.num_updates == 0
    assert errors["kmeans"][0] < 0.9 * errors["samples"][0]


def test_levels_start_one_after_the_other():
    """Each on what the ones before it leave, so that every level has less to quantize."""
    model = make(num_quantizers=3)
    features = features_of(model)
    start_codebook(model, batches(), CodebookArguments(codebook_start="kmeans"), seed=0)
    errors = []
    for level in model.quantizer.levels:
        codebook = level.get_codebook().detach()
        features = features - codebook[nearest_assign(features, codebook)]
        errors.append(features.square().mean().item())
    alone = make()
    alone.load_state_dict(model.state_dict(), strict=False)  # the same encoder
    start_codebook(alone, batches(), CodebookArguments(codebook_start="kmeans"), seed=0)
    assert torch.equal(alone.get_codebook(), model.quantizer.levels[0].get_codebook())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_dead_codes_of_a_level_move_onto_what_it_gets():
    model = make(num_quantizers=2, use_codebook_projection=False)
    optimizer = make_optimizer(model, 1e-3, 0.0, 0.99)
    output = model(batches(1)[0])
    dead = torch.zeros(128, dtype=torch.bool)
    dead[[3, 64 + 5, 64 + 6]] = True
    before = model.get_codebook().detach().clone()
    assert reseed(model.quantizer, dead, output.latents, optimizer) == 3
    after = model.get_codebook().detach()
    assert torch.equal((after != before).any(dim=1), dead)
    features = split_heads(output.latents, 4)
    first = after[:64]
    rest = features - first[nearest_assign(features, first)]
    assert (
        distance_to_nearest(after[3:4], features).max() < 1e-5
        and distance_to_nearest(after[[69, 70]], rest).max() < 1e-5
    )


def test_a_start_needs_as_many_features_as_codes():
    model = make(codebook_size=5000)
    with pytest.raises(ValueError, match="needs at least as many features as codes, got 4096 for 5000"):
        start_codebook(model, batches(2), CodebookArguments(codebook_start="samples"), seed=0)
    start_codebook(model, batches(4), CodebookArguments(codebook_start="samples", codebook_start_batches=3), seed=0)


def test_the_codebook_can_be_set_through_the_projection():
    quantizer = OptVQQuantizer(codebook_size=16, dim=4)
    codes = torch.randn(16, 4)
    set_codebook(quantizer, codes)
    torch.testing.assert_close(quantizer.get_codebook(), codes)


@pytest.mark.parametrize("fields", [{}, {"use_projection": False}, {"use_projection": False, "codebook_update": "ema"}])
def test_dead_codes_are_put_on_features(fields):
    torch.manual_seed(0)
    quantizer = OptVQQuantizer(codebook_size=32, dim=8, num_heads=2, **fields)
    latents = torch.randn(2, 8, 4, 4) + 10
    optimizer = make_optimizer(nn.ModuleList([quantizer, nn.Linear(1, 1)]), 1e-3, 0.0)
    output = quantizer(latents)
    if output.loss.requires_grad:
        output.loss.backward()
        optimizer.step()
    before = quantizer.get_codebook().detach()
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[3, 17, 30]] = True
    assert reseed(quantizer, dead, latents, optimizer) == 3
    after, features = quantizer.get_codebook().detach(), split_heads(latents, quantizer.head_dim)
    assert distance_to_nearest(after[dead], features).max() < 1e-4
    assert torch.equal(after[~dead], before[~dead])
    for moments in optimizer.state.values():
        if moments["exp_avg"].shape == quantizer.embedding.weight.shape:
            assert (moments["exp_avg"][dead] == 0).all() and (moments["exp_avg"][~dead] != 0).any()
    assert reseed(quantizer, torch.zeros(32, dtype=torch.bool), latents, optimizer) == 0


def test_schedules():
    model = make()
    arguments = CodebookArguments(epsilon_schedule=[10.0, 90.0], balance_schedule=[1.0, 0.5], quantization_start=5)
    seen = []
    for step in range(101):
        follow_schedule(model, arguments, step, 101)
        quantizer = model.quantizer
        seen.append((quantizer.bypass, quantizer.epsilon, quantizer.balance))
    assert [bypass for bypass, *_ in seen] == [True] * 5 + [False] * 96
    assert seen[0][1:] == (10.0, 1.0) and seen[100][1:] == pytest.approx((90.0, 0.5))
    assert seen[50][1:] == pytest.approx((30.0, 0.75))
    follow_schedule(model, CodebookArguments(), 0, 1)
    assert model.quantizer.epsilon == pytest.approx(90) and model.quantizer.bypass is False


def test_the_configuration_says_how_a_run_moved_it(tmp_path):
    model = make()
    arguments = CodebookArguments(epsilon_schedule=[10.0, 90.0])
    note_schedules(model.config, arguments)
    follow_schedule(model, arguments, 1, 2)
    model.save_pretrained(tmp_path)
    again = OptVQModel.from_pretrained(tmp_path)
    assert again.config.training_schedules == {"sinkhorn_epsilon": [10.0, 90.0]}
    assert again.quantizer.epsilon == again.config.sinkhorn_epsilon == 90.0
    note_schedules(again.config, CodebookArguments())  # a run that moves nothing starts from there
    assert again.config.training_schedules is None and again.config.sinkhorn_epsilon == 90.0


@pytest.mark.parametrize("with_averages", [False, True])
def test_frozen_codes_stay(tmp_path, with_averages):
    """Of a model whose codes follow from the potentials: encoder, codebook and running state stay, the decoder learns."""
    settings = {
        "max_steps": 12,
        "eval_images": 0,
        "save_every": 0,
        "adversarial_weight": 0,
        "reseed_dead_codes_after": 0,
    }
    settings |= {"inference_assignment": "potentials", "random_flip": False, "training_assignment": "sinkhorn"}
    main(flags(tmp_path / "first", **settings, ema_decay=0))
    frozen = {"freeze_encoder": True, "freeze_codebook": True, "ema_decay": 0.5 if with_averages else 0}
    main(flags(tmp_path / "second", **settings, **frozen, model=tmp_path / "first", seed=1))
    before = OptVQModel.from_pretrained(tmp_path / "first")
    pixels = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for folder in ("second", "second/ema")[: 1 + with_averages]:
        after = OptVQModel.from_pretrained(tmp_path / folder)
        changed = {
            name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])
        }
        assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed), changed
        with torch.no_grad():
            assert torch.equal(after.encode(pixels).codes, before.encode(pixels).codes)


@pytest.mark.parametrize("cost", COSTS)
def test_the_log_compares_with_the_nearest_codes_by_the_cost_of_the_model(cost):
    model = make(cost=cost, training_assignment="nearest")
    [pixels] = batches(1)
    output = model(pixels)
    recorder = Recorder(model.config, torch.device("cpu"))
    result = StepResult(output, output.code_counts, model.get_codebook(), pixels, {"l2": torch.zeros(())})
    recorder.count(result, len(pixels))
    figures = recorder.entry(result, torch.zeros(()), 0.0, 0.0)
    assert figures["nearest_disagreement"] == 0
