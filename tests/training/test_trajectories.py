"""What a run does step by step: accumulated batches as one, and all as it was before."""

import json
from pathlib import Path

import pytest
import torch

from grids import slow
from optvq_hf.commands.train import make_parser
from optvq_hf.training.arguments import Recipe
from optvq_hf.training.checkpoints import networks_state, restore_networks_state
from optvq_hf.training.models import make_model
from optvq_hf.training.trainer import TrainingRun
from optvq_hf.training.watching.trackers import make_accelerator
from training.runs import finish, flags, read_log, run_here, start


PINNED = Path(__file__).parent / "trajectories"
COMPARED = (
    "loss",
    "l1",
    "quantizer",
    "perplexity",
    "gradient_norm",
    "generator",
    "discriminator",
    "adaptive_weight",
    "r1",
)
# 20 steps, the discriminator from step 10 on. Nothing is drawn at random in a process.
SETTINGS = {
    "max_steps": 20,
    "discriminator_start": 10,
    "discriminator_ramp": 5,
    "training_assignment": "sinkhorn",
    "reseed_dead_codes_after": 0,
    "save_every": 0,
    "batch_size": 16,
}
RUNS = {
    "default": {},
    # Few codes, or features of 8 numbers: otherwise a feature halfway between two codes, to 6 digits, turns up within 20 steps,
    # at one or another of them on every machine.
    "average": {
        "codebook_dim": 16,
        "num_codebook_heads": 2,
        "codebook_size": 32,
        "codebook_update": "ema",
        "use_codebook_projection": False,
        "codebook_start": "kmeans",
        "quantization_start": 4,
    },
    "vanilla": {
        "discriminator_loss": "vanilla",
        "codebook_dim": 16,
        "num_codebook_heads": 2,
        "balance_schedule": (1, 0.5),
    },
    "residual": {
        # Not from k-means, by which two features of a cluster leave residuals that are equal but for their sign.
        "num_quantizers": 3,
        "codebook_size": 32,
        "gradient_estimator": "rotation",
        "cost": "squared_euclidean",
    },
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


def trajectory(folder) -> list[dict]:
    return [{name: entry[name] for name in COMPARED if name in entry} for entry in read_log(folder)]


def assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected) == 20 and "generator" in expected[10] and "generator" not in expected[9]
    for step, (values, others) in enumerate(zip(actual, expected), start=1):
        assert values.keys() == others.keys()
        for name in values:
            assert values[name] == pytest.approx(others[name], rel=tolerance, abs=tolerance * 1e-2), (
                f"{name} at step {step}"
            )


def assert_as_it_was(folder, name):
    pinned = json.loads((PINNED / f"{name}.json").read_text())
    assert_close(trajectory(folder), pinned, 1e-3)  # machines round differently


def test_a_run_is_as_it_was(tmp_path):
    """The other runs are compared in tests/distributed, beside those of two processes."""
    run_here(tmp_path, **SETTINGS, **RUNS["default"])
    assert_as_it_was(tmp_path, "default")


def make_run(folder, **settings) -> TrainingRun:
    parsed = make_parser().parse(flags(folder, **{**SETTINGS, "discriminator_start": 0, **settings}))
    recipe = Recipe(*parsed[:5])
    torch.manual_seed(0)
    model, image_processor = make_model({name: value for name, value in vars(parsed[-1]).items() if value is not None})
    return TrainingRun(model, image_processor, [], 20, recipe, make_accelerator(recipe))


def states(of: TrainingRun) -> dict:
    return {**of.model.state_dict(), **of.networks.discriminator.state_dict(prefix="d.")}


def test_accumulated_batches_are_averaged(tmp_path):
    """A batch twice is the batch once, for both networks: no gradient is counted twice and none is lost."""
    batch = torch.rand(8, 1, 16, 16) * 2 - 1
    without_memory = {"lecam_weight": 0, "sinkhorn_warm_start": False}  # of one batch in the next
    once, twice = make_run(tmp_path, **without_memory), make_run(tmp_path, **without_memory)
    for step in range(5):
        single, double = once.take_step([batch], step), twice.take_step([batch, batch], step)
        for name in single.values:
            torch.testing.assert_close(double.values[name], single.values[name], rtol=1e-4, atol=1e-5)
    expected, actual = states(once), states(twice)
    for name in expected:
        if "running" not in name and "num_" not in name and "potentials" not in name and "cost_scale" not in name:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_an_ema_codebook_moves_once_per_step(tmp_path):
    """Two batches of 8 are one of 16: for counts, sums and codes, which count images and not batches."""
    settings = {"codebook_update": "ema", "use_codebook_projection": False, "training_assignment": "nearest"}
    settings |= {"sinkhorn_warm_start": False, "codebook_ema_decay": 0.9, "adversarial_weight": 0, "lecam_weight": 0}
    whole, halves = make_run(tmp_path, **settings), make_run(tmp_path, **settings)
    for step in range(5):
        batch = torch.rand(16, 1, 16, 16) * 2 - 1
        once, twice = whole.take_step([batch], step), halves.take_step([batch[:8], batch[8:]], step)
        assert torch.equal(once.code_counts, twice.code_counts) and once.code_counts.sum() == 16 * 16
        expected, actual = whole.model.quantizer, halves.model.quantizer
        torch.testing.assert_close(actual.ema_counts, expected.ema_counts, rtol=1e-5, atol=1e-6)
        for name in ("ema_sums", "embedding.weight"):
            one, other = (quantizer.state_dict()[name] for quantizer in (expected, actual))
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4, msg=name)
    first = 0.1 * once.code_counts
    assert (expected.ema_counts - first).min() >= -1e-5  # the last step has the weight of one step


def test_accumulated_batches_count(tmp_path):
    """Codes of all batches of a step, and the mean of their losses."""
    one, both = make_run(tmp_path), make_run(tmp_path)
    first, second = torch.rand(8, 1, 16, 16) * 2 - 1, torch.rand(8, 1, 16, 16) - 1
    result = both.take_step([first, second], 0)
    assert result.code_counts.sum() == 2 * 8 * 16
    expected = one.take_step([first], 0)
    assert (
        not torch.equal(result.code_counts, expected.code_counts) and (result.code_counts >= expected.code_counts).all()
    )
    with torch.no_grad():
        other = make_run(tmp_path).networks.trained.train()(second)
    l1 = (expected.values["l1"] + (other.reconstruction - second).abs().mean()) / 2
    torch.testing.assert_close(result.values["l1"], l1)


def test_the_generator_step_leaves_no_gradient_in_the_discriminator(tmp_path):
    """The discriminator moves exactly as its own loss says."""
    both = make_run(tmp_path, r1_weight=0, lecam_weight=0)
    batch = torch.rand(8, 1, 16, 16) * 2 - 1
    seen = {}
    step = both.networks.learners["discriminator"].step

    def keep():
        seen.update({name: p.grad.clone() for name, p in both.networks.discriminator.named_parameters()})
        return step()

    both.networks.learners["discriminator"].step = keep
    before = {name: tensor.clone() for name, tensor in both.networks.discriminator.state_dict().items()}
    result = both.take_step([batch], 0)
    both.networks.discriminator.load_state_dict(before)
    loss, _ = both.networks.objective.discriminator_loss(result.output.reconstruction, batch, 0)
    loss.backward()
    for name, parameter in both.networks.discriminator.named_parameters():
        torch.testing.assert_close(parameter.grad, seen[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"channels_last": True}, slow({"compile": True})], ids=str
)
def test_faster_or_smaller_but_the_same(tmp_path, settings):
    batches = [torch.rand(4, 1, 16, 16) * 2 - 1 for _ in range(3)]
    small = {"backbone": "vqgan", "base_channels": 32, "channel_multiplier": (1, 2), "num_res_blocks": 1}
    small = {**small, "attn_resolutions": 8, "latent_channels": 8} if "compile" not in settings else {}
    plain, other = make_run(tmp_path, **small), make_run(tmp_path, **small, **settings)
    for step, batch in enumerate(batches):
        expected, actual = plain.take_step([batch], step), other.take_step([batch], step)
        torch.testing.assert_close(actual.values["loss"], expected.values["loss"], rtol=1e-4, atol=1e-5)
    if "channels_last" in settings:
        assert other.model.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    if "gradient_checkpointing" in settings:
        assert other.model.is_activation_checkpointing


def test_skipped_steps_are_counted_through_a_checkpoint(tmp_path):
    """Also those in a row that ended before it and were not looked at yet. Outside steps nothing is deferred."""
    before, after = make_run(tmp_path), make_run(tmp_path)
    batch = torch.rand(8, 1, 16, 16) * 2 - 1
    for step, values in enumerate((batch, batch * torch.nan, batch * torch.nan, batch)):
        before.take_step([values], step)
    assert not before.model.quantizer.defer_updates and before.model.quantizer.num_updates == 2
    restore_networks_state(after.networks, *networks_state(before.networks))
    assert after.networks.longest_skip == 2
    for name, learner in after.networks.learners.items():
        assert (learner.skipped, learner.skipped_in_a_row) == (2, 0), name


def test_averaged_weights(tmp_path):
    """Against the definition, with a decay that rises to its value."""
    both = make_run(tmp_path, ema_decay=0.5)
    expected = None
    for step in range(6):
        both.take_step([torch.rand(8, 1, 16, 16) * 2 - 1], step)
        weight = both.model.decoder[0].weight.detach().double()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
    torch.testing.assert_close(both.networks.averaged.module.decoder[0].weight.double(), expected, rtol=1e-5, atol=1e-7)
    for name, buffer in both.model.named_buffers():
        assert torch.equal(dict(both.networks.averaged.module.named_buffers())[name], buffer)
    assert not both.networks.averaged.module.training


if (
    __name__ == "__main__"
):  # writes the pinned trajectories anew: PYTHONPATH=tests python tests/training/test_trajectories.py
    import tempfile

    for name, settings in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            finish(start(Path(folder), **{**SETTINGS, **settings}))
            (PINNED / f"{name}.json").write_text(
                "[\n" + ",\n".join(map(json.dumps, trajectory(Path(folder)))) + "\n]\n"
            )
