"""The objective and its parts, against the original's values (golden) and on their own."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from optvq_hf.training.arguments import ObjectiveArguments
from optvq_hf.training.losses import perceptual
from optvq_hf.training.losses.adversarial import (
    LeCam,
    adaptive_weight,
    discriminator_loss,
    frozen,
    generator_loss,
    gradient_penalty,
)
from optvq_hf.training.losses.discriminator import PatchDiscriminator
from optvq_hf.training.losses.objective import Objective, make_objective
from optvq_hf.training.losses.perceptual import PerceptualLoss


VALUES = {"rtol": 1e-4, "atol": 1e-5}
GRADIENTS = {"rtol": 1e-3, "atol": 1e-5}


def close(actual, expected, **tolerances):
    torch.testing.assert_close(actual.reshape(expected.shape), expected, **tolerances)


@pytest.fixture
def stored(golden):
    index, tensors = (
        json.loads((golden / "discriminator.json").read_text()),
        load_file(golden / "discriminator.safetensors"),
    )

    def of(case):
        return {
            name.removeprefix(case + "/"): tensor for name, tensor in tensors.items() if name.startswith(case + "/")
        }

    return index, of


def state_dict(values, prefix):
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in values.items() if name.startswith(prefix)}


# ---- the original's values -------------------------------------------------------------------------------------------


def test_discriminators(stored, count_golden):
    index, of = stored
    for case in index["discriminators"]:
        values = of(case["id"])
        discriminator = PatchDiscriminator.from_weights(state_dict(values, "state_dict/"))
        sizes = PatchDiscriminator(case["input_nc"], case["ndf"], case["n_layers"])
        assert {k: v.shape for k, v in sizes.state_dict().items()} == {
            k: v.shape for k, v in discriminator.state_dict().items()
        }
        close(discriminator.eval()(values["input"]), values["logits_eval"], **VALUES)
        pixels = values["input"].clone().requires_grad_()
        logits = discriminator.train()(pixels)
        close(logits, values["logits_train"], **VALUES)
        logits.mean().backward()
        close(pixels.grad, values["grad_input_of_mean_logits_train"], **GRADIENTS)
        for name, tensor in state_dict(values, "state_dict_after/").items():
            close(discriminator.state_dict()[name], tensor, **VALUES)
        count_golden("discriminators")


def test_discriminator_losses(stored, count_golden):
    index, of = stored
    for case in index["d_losses"]:
        values = of(case["id"])
        for kind in ("hinge", "vanilla"):
            loss = discriminator_loss(values["logits_real"], values["logits_fake"], kind)
            close(loss, values[kind], **VALUES)
            count_golden("discriminator losses")


def test_adaptive_weights(stored, count_golden):
    index, of = stored
    for case in index["adaptive_weight"]:
        values = of(case["id"])
        weight = case["loss_g_weight"] * adaptive_weight(values["nll_grads"], values["g_grads"])
        close(weight, values["weight"], **VALUES)
        count_golden("adaptive weights")


def test_objectives(stored, count_golden):
    """The whole objective without the perceptual loss. Before its start the original trains the discriminator; we do not."""
    index, of = stored
    values = of("objective")
    for case in index["objective"]:
        expected, settings, step = of(case["id"]), case["settings"], case["global_step"]
        arguments = ObjectiveArguments(
            l1_weight=settings["loss_l1_weight"],
            l2_weight=settings["loss_l2_weight"],
            quantizer_weight=settings["loss_q_weight"],
            adversarial_weight=settings["loss_g_weight"],
            discriminator_weight=settings["loss_d_weight"],
            discriminator_loss=case["disc_loss"],
            discriminator_start=settings["disc_start"],
        )
        discriminator = PatchDiscriminator.from_weights(state_dict(values, "discriminator/")).train()
        objective = Objective(arguments, discriminator=discriminator)
        last_layer = nn.Parameter(values["last_layer.weight"].clone())
        reconstruction = F.conv2d(values["features"], last_layer, values["last_layer.bias"], padding=1)
        if case["mode"] == 0:
            loss, parts = objective.autoencoder_loss(
                reconstruction, values["inputs"], values["codebook_loss"].squeeze(), step, last_layer
            )
            close(loss, expected["loss"], **VALUES)
            loss.backward()
            close(last_layer.grad, expected["grad.last_layer.weight"], **GRADIENTS)
            names = {"l1": "loss_l1", "l2": "loss_l2", "quantizer": "loss_q", "generator": "loss_g"}
            for ours, theirs in names.items():
                if ours in parts:
                    assert parts[ours].item() == pytest.approx(case["log"][theirs], rel=1e-4)
            assert ("generator" in parts) == (step >= settings["disc_start"])
            if "generator" in parts:
                weight = settings["loss_g_weight"] * parts["adaptive_weight"].item()
                assert weight == pytest.approx(case["log"]["loss_g_weight"], rel=1e-4)
        else:
            if step < settings["disc_start"]:
                assert objective.discriminator_loss(reconstruction, values["inputs"], step) == (None, {})
                objective.arguments.discriminator_start = 0
            loss, parts = objective.discriminator_loss(reconstruction, values["inputs"], step)
            close(loss, expected["loss"], **VALUES)
            loss.backward()
            close(objective.discriminator.main[0].weight.grad, expected["grad.disc_first_conv"], **GRADIENTS)
            assert last_layer.grad is None
            for name in ("logits_real", "logits_fake"):
                assert parts[name].item() == pytest.approx(case["log"][name], rel=1e-3)
        count_golden("objectives")


# ---- our own promises ------------------------------------------------------------------------------------------------


def small_objective(start=0):
    torch.manual_seed(0)
    return adversarial(PatchDiscriminator(3, 8, 1), discriminator_start=start)


def adversarial(discriminator, **arguments):
    return Objective(ObjectiveArguments(adversarial_weight=1.0, **arguments), discriminator=discriminator)


def pictures():
    generator = torch.Generator().manual_seed(1)
    last_layer = nn.Parameter(torch.randn(3, 4, 1, 1, generator=generator))
    features = torch.randn(2, 4, 16, 16, generator=generator)
    return F.conv2d(features, last_layer), torch.randn(2, 3, 16, 16, generator=generator), last_layer


def test_weights_of_the_parts():
    pixels, half = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5)
    objective = Objective(ObjectiveArguments(l1_weight=2.0, l2_weight=4.0, quantizer_weight=0.5))
    loss, parts = objective.autoencoder_loss(half, pixels, torch.tensor(2.0))
    assert loss == 2 * 0.5 + 4 * 0.25 + 0.5 * 2
    expected = {"l1": 0.5, "l2": 0.25, "quantizer": 2.0, "quantizer_share": pytest.approx(100 / 3)}
    assert {name: part.item() for name, part in parts.items()} == expected


def test_the_generator_step_leaves_no_gradient_in_the_discriminator():
    objective = small_objective()
    reconstruction, pixels, last_layer = pictures()
    loss, parts = objective.autoencoder_loss(reconstruction, pixels, torch.zeros(()), 0, last_layer)
    loss.backward()
    assert parts["adaptive_weight"] > 0 and last_layer.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in objective.discriminator.parameters())
    assert all(parameter.requires_grad for parameter in objective.discriminator.parameters())


def test_the_adversarial_gradient_reaches_the_decoder():
    gradients = []
    for objective in (small_objective(), Objective(ObjectiveArguments())):
        reconstruction, pixels, last_layer = pictures()
        objective.autoencoder_loss(reconstruction, pixels, torch.zeros(()), 0, last_layer)[0].backward()
        gradients.append(last_layer.grad)
    assert not torch.allclose(*gradients)


def test_nothing_adversarial_before_its_start():
    objective = small_objective(start=5)
    reconstruction, pixels, last_layer = pictures()
    before = {name: tensor.clone() for name, tensor in objective.discriminator.state_dict().items()}
    assert objective.discriminator_loss(reconstruction, pixels, 4) == (None, {})
    assert "generator" not in objective.autoencoder_loss(reconstruction, pixels, torch.zeros(()), 4, last_layer)[1]
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.discriminator.state_dict().items())
    assert objective.discriminator_loss(reconstruction, pixels, 5)[0] is not None


def test_errors_pass_through_the_adaptive_weight():
    """An error, out of memory for example, is not taken for a missing gradient."""
    reconstruction, pixels, _ = pictures()
    unrelated = nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match="not .*used in the graph"):
        small_objective().autoencoder_loss(reconstruction, pixels, torch.zeros(()), 0, unrelated)


def test_frozen_restores_what_was_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with pytest.raises(ValueError), frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise ValueError
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_losses_know_their_sides():
    large, small = torch.full((2, 1, 3, 3), 3.0), torch.full((2, 1, 3, 3), -3.0)
    for kind in ("hinge", "vanilla"):
        assert discriminator_loss(large, small, kind) < 0.1 < discriminator_loss(small, large, kind)
    assert generator_loss(large) == -3
    with pytest.raises(ValueError, match="hinge.*'wgan'"):
        discriminator_loss(large, small, "wgan")


def test_discriminator_is_saved_and_loaded(tmp_path):
    discriminator = PatchDiscriminator(1, 8, 2).eval()
    discriminator.save_pretrained(tmp_path)
    loaded = PatchDiscriminator.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 1, 32, 32)
    assert torch.equal(loaded(pixels), discriminator(pixels))


@pytest.mark.parametrize("change", ["few", "shape"])
def test_weights_of_something_else_are_no_discriminator(change):
    weights = PatchDiscriminator(3, 8, 2).state_dict()
    if change == "few":
        weights = {"main.0.weight": weights["main.0.weight"]}
    else:
        weights["main.3.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match="not those of a patch discriminator"):
        PatchDiscriminator.from_weights(weights)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        PatchDiscriminator(num_layers=0)


# ---- perceptual loss -------------------------------------------------------------------------------------------------


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, a, b):
        return (self.dropout(self.features(a)) - self.dropout(self.features(b))).square().mean(dim=(1, 2, 3))


def test_the_perceptual_loss_is_frozen_and_never_random():
    loss = PerceptualLoss(Dropped())
    outer = nn.ModuleList([loss]).train()
    assert not any(parameter.requires_grad for parameter in outer.parameters())
    assert not any(module.training for module in loss.modules())
    reconstruction = torch.randn(2, 3, 8, 8, requires_grad=True)
    values = [loss(reconstruction, torch.zeros(2, 3, 8, 8)) for _ in range(2)]
    assert torch.equal(*values)
    values[0].backward()
    assert reconstruction.grad.abs().sum() > 0
    assert loss(torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)) > 0  # grayscale

    objective = Objective(ObjectiveArguments(perceptual_weight=2.0), perceptual=loss)
    total, parts = objective.autoencoder_loss(torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(()))
    torch.testing.assert_close(total, 2 + 2 * parts["perceptual"])
    assert (
        "perceptual"
        not in Objective(ObjectiveArguments(), perceptual=loss).autoencoder_loss(
            torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(())
        )[1]
    )


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(perceptual.torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", unreachable, raising=False)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(OSError, match="cannot download the ImageNet weights of 'vgg'.*set the perceptual weight to 0"):
        PerceptualLoss("vgg")


def test_an_unknown_perceptual_network():
    with pytest.raises(ValueError, match="must be one of .*'vgg', 'alex', 'squeeze'.* or a module, got 'resnet'"):
        PerceptualLoss("resnet")


# ---- regularisation of the discriminator -----------------------------------------------------------------------------


def test_r1_is_half_the_squared_gradient_norm():
    """Against finite differences of a network without batch norm."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    pixels = torch.randn(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(network(pixels), pixels)
    steps = 1e-6 * torch.eye(12, dtype=torch.float64)
    with torch.no_grad():
        flat = pixels.flatten(1)
        slopes = torch.stack([(network(flat + step) - network(flat - step)).squeeze(1) / 2e-6 for step in steps], dim=1)
    torch.testing.assert_close(penalty.detach(), 0.5 * slopes.square().sum(dim=1).mean(), rtol=1e-5, atol=1e-8)
    penalty.backward()  # it is a loss of the network's weights
    assert network[1].weight.grad.abs().sum() > 0


def test_lecam_pulls_logits_to_the_running_means():
    lecam = LeCam(decay=0.5)
    real, fake = torch.tensor([2.0, 4.0], requires_grad=True), torch.tensor([-1.0, -3.0], requires_grad=True)
    loss = lecam(real, fake)  # the means are now 1.5 and -1
    assert (lecam.mean_real.item(), lecam.mean_fake.item()) == (1.5, -1.0)
    assert loss.item() == pytest.approx((3**2 + 5**2) / 2 + (2.5**2 + 4.5**2) / 2)
    loss.backward()
    assert (real.grad > 0).all() and (fake.grad < 0).all()  # against what the discriminator wants
    assert lecam(torch.full((2,), -9.0), torch.full((2,), 9.0)).item() == 0  # it does not reward confusion


def test_the_adversarial_weight_rises_over_the_ramp():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(1, 8, 1)
    layer = nn.Conv2d(1, 1, 3, padding=1)
    pixels = torch.randn(2, 1, 16, 16)
    losses = {}
    for ramp, step in ((0, 5), (10, 4), (10, 5), (10, 9), (10, 14), (10, 100)):
        objective = adversarial(discriminator, discriminator_start=5, discriminator_ramp=ramp)
        loss, parts = objective.autoencoder_loss(layer(pixels), pixels, torch.zeros(()), step, layer.weight)
        losses[ramp, step] = (loss.item() - parts["l1"] - parts["l2"]) / 1.0
    whole = losses[0, 5].item()
    assert losses[10, 4].item() == pytest.approx(0, abs=1e-6)
    for step, share in ((5, 0.1), (9, 0.5), (14, 1.0), (100, 1.0)):
        assert losses[10, step].item() == pytest.approx(share * whole, rel=1e-3)


def test_r1_comes_every_so_many_steps():
    objective = adversarial(PatchDiscriminator(1, 8, 1), discriminator_start=3, r1_weight=2.0, r1_every=4)
    pixels = torch.randn(2, 1, 16, 16)
    had = {step: "r1" in objective.discriminator_loss(pixels, pixels, step)[1] for step in range(12)}
    assert [step for step, penalized in had.items() if penalized] == [3, 7, 11]
    loss, parts = objective.discriminator_loss(pixels, pixels, 3)
    assert loss.item() == pytest.approx((parts["discriminator"] + 2 * 4 * parts["r1"]).item(), rel=1e-5)


def test_the_objective_that_arguments_ask_for(tmp_path, monkeypatch):
    nothing = make_objective(ObjectiveArguments(), 3, torch.device("cpu"))
    assert nothing.discriminator is None and nothing.perceptual is None and nothing.lecam is None
    monkeypatch.setattr(perceptual, "_download", lambda network: nn.Identity())
    arguments = ObjectiveArguments(
        perceptual_weight=1.0, adversarial_weight=0.5, lecam_weight=0.1, discriminator_layers=2
    )
    everything = make_objective(arguments, 1, torch.device("cpu"))
    assert (
        everything.arguments.adversarial_weight == 0.5
        and everything.perceptual is not None
        and everything.lecam is not None
    )
    assert everything.discriminator.main[0].in_channels == 1
    everything.discriminator.save_pretrained(tmp_path)
    given = ObjectiveArguments(adversarial_weight=1.0, discriminator_weights=str(tmp_path))
    weights = make_objective(given, 1, torch.device("cpu")).discriminator.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in everything.discriminator.state_dict().items())
    with pytest.raises(ValueError, match="takes images of 1 channels, but the model has num_channels=3"):
        make_objective(given, 3, torch.device("cpu"))


def test_a_discriminator_that_is_none(tmp_path, trained_folder):
    for folder in ("/no/such", tmp_path, trained_folder):
        arguments = ObjectiveArguments(adversarial_weight=1.0, discriminator_weights=str(folder))
        with pytest.raises(ValueError, match=f"cannot load the discriminator of '{folder}'"):
            make_objective(arguments, 1, torch.device("cpu"))
