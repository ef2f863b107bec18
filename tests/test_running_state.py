"""The quantizer's running state (averages, warm start, EMA codebook) when a forward pass is more or less than a step."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from builders import pixels, plain_config
from optvq_hf import OptVQModel, OptVQQuantizer, ResidualOptVQQuantizer, running_state


KINDS = {
    "average": {"use_projection": False, "codebook_update": "ema", "ema_decay": 0.5},
    "warm start": {"warm_start": True, "iterations": 2},
    "both": {"use_projection": False, "codebook_update": "ema", "ema_decay": 0.5, "warm_start": True},
    "neither": {},
    "nearest": {"use_projection": False, "codebook_update": "ema", "training_assignment": "nearest"},
    "sampled": {"warm_start": True, "training_assignment": "sample"},
    "cross entropy": {"warm_start": True, "iterations": 2, "loss_type": "cross_entropy"},
    "soft": {"warm_start": True, "iterations": 2, "training_assignment": "soft"},
}
of_every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


def make(**fields):
    torch.manual_seed(0)
    return OptVQQuantizer(**{"codebook_size": 64, "dim": 8, "num_heads": 2, **fields})


def num_solved(fields, number):
    """How many of `number` batches are assigned by transport."""
    return 0 if fields.get("training_assignment") == "nearest" else number


def batches(number, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 8, 6, 6, generator=generator) + shift for shift in range(number)]


def plainly(module, *arguments):
    return module(*arguments)


def checkpointed(use_reentrant):
    return lambda module, *arguments: checkpoint(module, *arguments, use_reentrant=use_reentrant)


def steps_of(quantizer, run, batches_of_steps):
    """Gradients of the inputs and of the quantizer at every step, of losses that depend on the codes, and the last state."""
    torch.manual_seed(2)
    layer = torch.nn.Conv2d(8, 8, 1)  # what a checkpointed encoder would compute again

    def loss_of(pixels):
        output = quantizer(layer(pixels))
        return output.loss + (output.quantized - pixels).square().mean()

    gradients = []
    for of_step in batches_of_steps:
        of_step = [batch.clone().requires_grad_() for batch in of_step]
        sum(run(loss_of, batch) for batch in of_step).backward()
        gradients += [batch.grad for batch in of_step]
        for parameter in (*quantizer.parameters(), *layer.parameters()):
            if parameter.grad is not None:
                gradients.append(parameter.grad.clone())
                parameter.grad = None
    return gradients, {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


@of_every_kind
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("per_step", [1, 3], ids=["a batch", "three batches"])
def test_gradient_checkpointing_changes_nothing(fields, use_reentrant, per_step):
    """Recomputation meets the codes and potentials of its forward pass, and moves none; also of several batches at once."""
    data = batches(4 * per_step)
    steps = [data[start : start + per_step] for start in range(0, len(data), per_step)]
    plain = steps_of(make(**fields), plainly, steps)
    again = steps_of(make(**fields), checkpointed(use_reentrant), steps)
    for one, other in zip(plain[0], again[0], strict=True):
        torch.testing.assert_close(one, other)
    for name, tensor in plain[1].items():
        torch.testing.assert_close(again[1][name], tensor, msg=name)
    assert again[1]["num_updates"] == num_solved(fields, 4 * per_step)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "fields", [{"codebook_update": "ema", "use_codebook_projection": False}, {"sinkhorn_warm_start": True}], ids=str
)
def test_checkpointing_the_whole_model(fields, use_reentrant):
    torch.manual_seed(0)
    model = OptVQModel(plain_config(**fields)).train()
    twin = copy.deepcopy(model)
    for step in range(3):
        x = (pixels(4, 3, 32, 32) * (step + 1) / 3).requires_grad_()
        model(x).loss.backward()
        checkpoint(lambda pixel_values: twin(pixel_values).loss, x, use_reentrant=use_reentrant).backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, msg=name)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], tensor, msg=name)


def test_nothing_is_remembered_without_checkpointing():
    quantizer = make(**KINDS["both"])
    for batch in batches(3):
        quantizer(batch.requires_grad_()).loss.backward()
    assert quantizer._starts == []
    for batch in batches(40):
        checkpoint(quantizer, batch.requires_grad_(), use_reentrant=False).loss.backward()
    assert len(quantizer._starts) == 1
    with torch.no_grad():
        for batch in batches(40):
            quantizer(batch)
    assert len(quantizer._starts) == quantizer.max_starts


of_both_ways = pytest.mark.parametrize("use_reentrant", [False, True])


def loss_of_copy(quantizer, run, batch):
    """A copy of the batch, and a loss of it that depends on the codes."""

    def loss_of(pixels):
        output = quantizer(pixels)
        return output.loss + output.quantized.square().mean()

    batch = batch.clone().requires_grad_()
    return batch, run(loss_of, batch)


@of_both_ways
def test_a_pass_without_a_backward_pass_is_not_recalled(use_reentrant):
    """Features of the same batch before, without gradients: the newer start is the right one."""
    [batch] = batches(1)
    plain, again = make(**KINDS["both"]), make(**KINDS["both"])
    gradients = []
    for quantizer, run in ((plain, plainly), (again, checkpointed(use_reentrant))):
        with torch.no_grad():
            quantizer(batch)
        inputs, loss = loss_of_copy(quantizer, run, batch)
        loss.backward()
        gradients.append(inputs.grad)
    assert torch.equal(*gradients)


@of_both_ways
def test_the_same_batch_twice_in_a_step(use_reentrant):
    """Also if the graph is kept and used again."""
    [batch] = batches(1)
    plain, again = make(**KINDS["both"]), make(**KINDS["both"])
    gradients = []
    for quantizer, run in ((plain, plainly), (again, checkpointed(use_reentrant))):
        (one, first), (other, second) = loss_of_copy(quantizer, run, batch), loss_of_copy(quantizer, run, batch)
        for _ in range(2):
            (first + second).backward(retain_graph=True)
        gradients.append(torch.stack([one.grad, other.grad]))
    assert not torch.equal(*gradients[0])
    assert torch.equal(*gradients)


@of_both_ways
def test_a_start_that_was_not_kept_is_an_error(use_reentrant):
    """More batches than are kept: no other batch takes the place of the first."""
    quantizer = make(**KINDS["both"])
    losses = [
        loss_of_copy(quantizer, checkpointed(use_reentrant), batch)[1] for batch in batches(quantizer.max_starts + 1)
    ]
    sum(losses[1:]).backward()
    with pytest.raises(RuntimeError, match="288 features is computed again .* last 16 batches .* `max_starts`"):
        losses[0].backward()


def test_without_the_private_functions_of_torch(monkeypatch):
    for name in ("_backward_pass", "_saved_tensors_hooks"):
        quantizer = make(**KINDS["both"])
        with monkeypatch.context() as patch:
            patch.setattr(running_state, name, None)
            checkpoint(quantizer, batches(1)[0].requires_grad_(), use_reentrant=False).quantized.sum().backward()
        assert quantizer._starts == []


def test_copies_and_resets_forget_earlier_batches():
    quantizer = make(**KINDS["both"])
    with torch.no_grad():
        quantizer(batches(1)[0])
    quantizer.defer_updates = True
    quantizer(batches(1)[0])
    assert quantizer._starts and quantizer._collected and quantizer._num_solved
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert twin._starts == [] and quantizer._starts
        twin.apply_updates()
        assert twin.num_updates == 2
    quantizer.reset_parameters()
    quantizer.apply_updates()
    assert quantizer._starts == [] and quantizer.num_updates == 0


@pytest.mark.parametrize("defers", [False, True])
def test_replicas_of_data_parallel_share_nothing(defers):
    """They begin with the attributes of the module, as shallow copies."""
    quantizer = make(**KINDS["both"])
    quantizer.defer_updates = defers
    quantizer(batches(1)[0])
    kept = dict(quantizer._collected)
    replicas = [quantizer._replicate_for_data_parallel() for _ in range(2)]
    for replica in replicas:
        for name in ("_parameters", "_buffers", "_modules"):
            setattr(replica, name, copy.deepcopy(getattr(quantizer, name)))
        replica(batches(2)[1])
    assert quantizer._collected == kept and bool(kept) is defers
    for name, tensor in replicas[0].state_dict().items():
        assert torch.equal(replicas[1].state_dict()[name], tensor)


def test_a_failed_step_defers_nothing_afterwards():
    quantizer = make()
    with pytest.raises(ValueError, match="stop"), quantizer.deferring():
        quantizer(batches(1)[0])
        raise ValueError("stop")
    assert not quantizer.defer_updates
    quantizer(batches(1)[0])
    assert quantizer.num_updates == 1


@pytest.mark.parametrize("num_images", [0, 2])
def test_the_loss_of_an_empty_batch_is_zero(num_images):
    model = OptVQModel(plain_config()).train()
    loss = model(torch.zeros(num_images, 3, 32, 32)).loss
    loss.backward()
    assert loss.isfinite() and (loss == 0) == (num_images == 0)
    assert model.decoder[0].weight.grad is not None


@pytest.mark.parametrize("fields", [{}, KINDS["average"]], ids=["gradient", "average"])
def test_deferred_updates_of_several_batches_are_those_of_one(fields):
    """Of nearest codes, which do not depend on the batch: the codes move once, by the sum of all micro-batches."""
    whole, parts = make(**fields, training_assignment="nearest"), make(**fields, training_assignment="nearest")
    parts.defer_updates = True
    for of_step in (batches(4, seed) for seed in range(3)):
        whole(torch.cat(of_step))
        before = parts.get_codebook().clone()
        for batch in of_step:
            parts(batch)
            assert torch.equal(parts.get_codebook(), before)
        parts.apply_updates()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, msg=name)


@of_every_kind
def test_a_deferred_batch_is_a_batch(fields):
    at_once, deferred = make(**fields), make(**fields)
    deferred.defer_updates = True
    for batch in batches(3):
        torch.manual_seed(5)
        at_once(batch)
        torch.manual_seed(5)
        deferred(batch)
        deferred.apply_updates(torch.tensor(True))
    assert deferred.num_updates == num_solved(fields, 3)
    for name, tensor in at_once.state_dict().items():
        assert torch.equal(deferred.state_dict()[name], tensor), name


def test_potentials_of_a_step_are_the_mean_of_its_batches():
    quantizer, alone = make(), make()
    quantizer.defer_updates = True
    first, second = batches(2)
    potentials = []
    for batch in (first, second):
        quantizer(batch)
        potentials.append(alone(batch).diagnostics["potentials"])
    assert quantizer.num_updates == 0
    quantizer.apply_updates()
    assert quantizer.num_updates == 1
    expected = sum(one - one.mean() for one in potentials) / 2
    torch.testing.assert_close(quantizer.potentials, expected.float(), rtol=1e-4, atol=1e-5)


@of_every_kind
def test_a_skipped_step_leaves_no_trace(fields):
    quantizer = make(**fields)
    quantizer(batches(1)[0])
    quantizer.defer_updates = True
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(batches(2)[1])
    quantizer.apply_updates(torch.tensor(False))
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    quantizer.apply_updates()  # nothing is left of it
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())


@pytest.mark.parametrize("kind", [OptVQQuantizer, ResidualOptVQQuantizer])
def test_whose_features_a_batch_has(tmp_path, kind):
    """All processes', a group's, or this process's alone; a copy has the same group."""
    quantizer = kind(codebook_size=16, dim=8, synchronize=False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.new_group([0])
        expected = {False: None, True: torch.distributed.group.WORLD, group: group}
        for synchronize, used in expected.items():
            quantizer.synchronize = synchronize
            copied = copy.deepcopy(quantizer)
            assert all(level._process_group() is used for level in (*quantizer.levels, *copied.levels))
            assert torch.equal(quantizer(torch.ones(4, 8)).codes, copied(torch.ones(4, 8)).codes)
            assert all(level._process_group() is None for level in copied.eval().levels)
        assert kind(codebook_size=16, dim=8, synchronize=group).synchronize is group
    finally:
        torch.distributed.destroy_process_group()
    for wrong in (None, "all", torch.distributed.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(ValueError, match="synchronize must be True, False or a group of this process, got "):
            kind(codebook_size=16, dim=8, synchronize=wrong)
