"""What transformers promises of every model: saving, loading, Auto classes, outputs, copies, training."""

import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageToImage

import optvq_hf
from builders import BOTH, make, make_untrained, pixels, plain_config, vqgan_config
from optvq_hf import OptVQConfig, OptVQImageProcessor, OptVQModel


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saving_and_loading_keeps_everything(tmp_path, dtype):
    model = make().train()
    model(pixels(4, 3, 32, 32))  # fills the running averages
    model.eval().to(dtype).save_pretrained(tmp_path)
    again, info = OptVQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not again.training
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert again.quantizer.num_updates == 1


def test_a_new_process_gives_identical_bits(tmp_path, new_process):
    model, x = make(), pixels(4, 3, 32, 32)
    model.save_pretrained(tmp_path)
    torch.save({"x": x, "codes": model.encode(x).codes, "pixels": model(x).reconstruction}, tmp_path / "expected.pt")
    script = (
        "import sys, torch, optvq_hf; from transformers import AutoModel; folder = sys.argv[1];"
        "e = torch.load(folder + '/expected.pt'); m = AutoModel.from_pretrained(folder);"
        "assert type(m).__name__ == 'OptVQModel'; encoded = m.encode(e['x']);"
        "assert torch.equal(encoded.codes, e['codes']);"
        "assert torch.equal(m(e['x']).reconstruction, e['pixels']);"
        "assert torch.equal(m.decode(codes=e['codes']).reconstruction, e['pixels']); print('identical')"
    )
    done = new_process(script, tmp_path)
    assert done.stdout.strip() == "identical", done.stderr


def test_loaded_weights_are_aligned(tmp_path):
    """In the file they begin anywhere, and CPU kernels round differently there."""
    make().save_pretrained(tmp_path)
    model, _ = OptVQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in model.state_dict().values())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any(file.get_tensor(name).data_ptr() % 64 for name in file.keys())  # noqa: SIM118


def test_a_saved_folder_loads_without_the_package(tmp_path, new_process):
    """It carries its own code: trust_remote_code is enough on a machine where this package is not installed."""
    make().save_pretrained(tmp_path / "model")
    OptVQImageProcessor(num_channels=3).save_pretrained(tmp_path / "model")
    script = (
        "import sys; sys.modules['optvq_hf'] = None\n"  # importing it is an error
        "from transformers import AutoImageProcessor, AutoModel; folder = sys.argv[1]\n"
        "model = AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
        "processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)\n"
        "import torch; output = model.train()(torch.zeros(2, 3, 32, 32)); output.loss.backward()\n"
        "print(type(model).__name__, type(processor).__name__, tuple(output.codes.shape))"
    )
    done = new_process(script, tmp_path / "model")
    assert done.stdout.strip() == "OptVQModel OptVQImageProcessor (2, 2, 8, 8)", done.stderr


def test_missing_tensors_are_initialised_and_loaded_ones_kept(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    dropped = ["quantizer.embedding.weight", "quantizer.potentials", "quantizer.cost_scale", "quantizer.num_updates"]
    save_file({k: v for k, v in state.items() if k not in dropped}, tmp_path / "model.safetensors", {"format": "pt"})
    again, info = OptVQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(dropped)
    fresh = again.state_dict()
    assert 0.8 < fresh["quantizer.embedding.weight"].std() < 1.2
    assert not fresh["quantizer.potentials"].any() and fresh["quantizer.cost_scale"] == 1
    assert all(torch.equal(fresh[k], v) for k, v in state.items() if k not in dropped)


def test_fresh_weights_start_as_torch_starts_them():
    model = make_untrained()
    convolution = model.decoder[0]
    bound = (convolution.in_channels * 9) ** -0.5  # kaiming uniform with a = sqrt(5)
    assert 0.9 * bound < convolution.weight.abs().max() <= bound
    assert 0.9 < model.quantizer.embedding.weight.std() < 1.1


def test_overrides_are_checked_against_each_other(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(Exception, match="codebook_dim must be divisible by num_codebook_heads, got 8 and 3"):
        OptVQModel.from_pretrained(tmp_path, num_codebook_heads=3)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_at_loading(tmp_path, config, dtype):
    make(config).save_pretrained(tmp_path)
    model = OptVQModel.from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype == dtype and model.quantizer.potentials.dtype == torch.float32
    output = model(pixels(2, 3, 32, 32))
    assert output.reconstruction.dtype == dtype and output.reconstruction.isfinite().all()


@BOTH
def test_sharded_weights(tmp_path, config):
    model = make(config)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "model.safetensors.index.json").is_file()
    again = OptVQModel.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(tmp_path, device_map):
    model, x = make(vqgan_config()), pixels(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    again = OptVQModel.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(again(x).reconstruction, model(x).reconstruction)
    assert torch.equal(again.decode(codes=again.encode(x).codes).reconstruction, model(x).reconstruction)


def test_subfolder(tmp_path):
    make().save_pretrained(tmp_path / "ema")
    OptVQImageProcessor(num_channels=1).save_pretrained(tmp_path / "ema")
    assert isinstance(AutoModel.from_pretrained(tmp_path, subfolder="ema"), OptVQModel)
    assert AutoImageProcessor.from_pretrained(tmp_path, subfolder="ema").num_channels == 1


@BOTH
def test_a_model_made_on_meta_gets_all_its_weights(tmp_path, config):
    """Nothing is computed from weights while a model is made, and no tensor is left without memory by loading."""
    with torch.device("meta"):
        model = OptVQModel(config)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    make(config).save_pretrained(tmp_path)
    loaded = OptVQModel.from_pretrained(tmp_path)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


@BOTH
def test_every_tensor_may_be_missing(tmp_path, config):
    make(config).save_pretrained(tmp_path)
    save_file({"quantizer.cost_scale": torch.tensor(2.0)}, tmp_path / "model.safetensors", {"format": "pt"})
    model = OptVQModel.from_pretrained(tmp_path)
    assert model.quantizer.cost_scale == 1  # the codes that it belonged to are missing
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert not model.quantizer.potentials.any() and model(pixels(1, 3, 32, 32)).reconstruction.isfinite().all()
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(weight.std() > 0 for weight in weights)


@pytest.mark.parametrize(
    "fields",
    [{}, {"freeze_codebook": True}, {"codebook_update": "ema", "use_codebook_projection": False}],
    ids=["learning", "frozen", "average"],
)
def test_what_is_frozen_stays_frozen(tmp_path, fields):
    """Loading makes new parameters, all of which would learn."""
    model = make(plain_config(**fields))
    model.save_pretrained(tmp_path)
    again = OptVQModel.from_pretrained(tmp_path)
    learning = {name: parameter.requires_grad for name, parameter in again.named_parameters()}
    assert learning == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert learning["quantizer.embedding.weight"] == (not fields)


def test_forward_without_data():
    """On the meta device, for those who count operations or plan memory."""
    with torch.device("meta"):
        model = OptVQModel(vqgan_config()).eval()
        assert model.encode(torch.zeros(2, 3, 32, 32)).codes.is_meta
        assert model(torch.zeros(2, 3, 32, 32)).reconstruction.shape == (2, 3, 32, 32)


# ---- Auto classes ----------------------------------------------------------------------------------------------------


def test_auto_classes(tmp_path):
    make().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), OptVQConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), OptVQModel)
    assert isinstance(AutoModelForImageToImage.from_pretrained(tmp_path), OptVQModel)
    assert isinstance(AutoModel.from_config(plain_config()), OptVQModel)
    assert AutoModel.from_config(plain_config(), dtype=torch.bfloat16).dtype == torch.bfloat16
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_optvq.OptVQConfig",
        "AutoModel": "modeling_optvq.OptVQModel",
        "AutoModelForImageToImage": "modeling_optvq.OptVQModel",
    }


def test_registering_twice_does_no_harm():
    AutoConfig.register("optvq", OptVQConfig, exist_ok=True)
    AutoConfig.register("optvq", OptVQConfig)
    AutoModel.register(OptVQConfig, OptVQModel)
    AutoModelForImageToImage.register(OptVQConfig, OptVQModel)
    AutoImageProcessor.register(OptVQConfig, image_processor_classes={"torchvision": OptVQImageProcessor})
    assert isinstance(AutoModel.from_config(plain_config()), OptVQModel)


def test_public_names():
    assert all(hasattr(optvq_hf, name) for name in optvq_hf.__all__)


# ---- outputs ---------------------------------------------------------------------------------------------------------


@BOTH
def test_tuples_instead_of_outputs(config):
    model, x = make(config), pixels(2, 3, 32, 32)
    codes = model.encode(x).codes
    for call in (
        lambda **flags: model(x, **flags),
        lambda **flags: model.encode(x, **flags),
        lambda **flags: model.decode(codes=codes, **flags),
    ):
        output = call()
        as_tuple = call(return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(output.to_tuple())
        assert all(torch.equal(one, other) for one, other in zip(as_tuple, output.to_tuple()))
    model.config.return_dict = False
    assert isinstance(model(x), tuple) and isinstance(model.encode(x), tuple)
    model.config.return_dict = True


@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_hidden_states(config, training):
    """From full resolution to that of the tokens; of the images of the batch alone."""
    model, x = make(config).train(training), pixels(2, 3, 32, 32)
    assert model(x).hidden_states is None and model.encode(x).hidden_states is None
    for output in (model(x, output_hidden_states=True), model.encode(x, output_hidden_states=True)):
        shapes = [tuple(hidden.shape) for hidden in output.hidden_states]
        assert all(shape[0] == 2 for shape in shapes)
        assert shapes[0][2:] == (32, 32) and shapes[-1][2:] == output.latents.shape[2:]
        assert "hidden_states" in output.keys()  # noqa: SIM118
    model.config.output_hidden_states = True
    assert model(x).hidden_states is not None and model(x, output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = False


@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_hidden_states_have_gradients(config, training):
    model, x = make(config).train(training), pixels(2, 3, 32, 32)
    output = model(x, output_hidden_states=True)
    for hidden in output.hidden_states:
        hidden.retain_grad()
    output.quantized.sum().backward()
    assert all(hidden.grad is not None and hidden.grad.abs().sum() > 0 for hidden in output.hidden_states)


@BOTH
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(config, use_reentrant):
    """The same losses and gradients, with activations computed twice."""
    results = []
    for checkpointing in (False, True):
        model, x = make(config).train(), pixels(2, 3, 32, 32)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        calls = []
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        output = model(x)
        loss = output.loss
        before = len(calls)
        loss.backward()
        results.append((loss, [parameter.grad for parameter in model.parameters()], len(calls) - before))
    (loss, gradients, again), (same_loss, same_gradients, recomputed) = results
    assert torch.equal(loss, same_loss) and again == 0 and recomputed > 0
    for one, other in zip(gradients, same_gradients):
        torch.testing.assert_close(one, other)


# ---- copies ----------------------------------------------------------------------------------------------------------


@BOTH
def test_copies_of_configurations_and_models(config, tmp_path):
    config = copy.deepcopy(config)
    config.sinkhorn_epsilon = 33.0
    config.save_pretrained(tmp_path)
    loaded = OptVQConfig.from_pretrained(tmp_path)
    assert json.loads(loaded.to_json_string(use_diff=False)) == json.loads(config.to_json_string(use_diff=False))
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), OptVQConfig.from_dict(config.to_dict())):
        assert again.to_dict() == config.to_dict() and again.sinkhorn_epsilon == 33.0
    model, x = make(config), pixels(2, 3, 32, 32)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x).reconstruction, model(x).reconstruction)
        assert again.quantizer.epsilon == 33.0


# ---- training in other people's loops --------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "config",
    [
        plain_config(),
        vqgan_config(),
        plain_config(freeze_codebook=True),
        plain_config(codebook_update="ema", use_codebook_projection=False),
        plain_config(training_assignment="nearest", codebook_loss_type="cross_entropy"),
        plain_config(training_assignment="soft"),
    ],
    ids=["plain_cnn", "vqgan", "frozen", "average", "cross_entropy", "soft"],
)
def test_ddp_finds_no_unused_parameter(config, process_group):
    """It would say so in the second step."""
    model = torch.nn.parallel.DistributedDataParallel(make(config).train())
    for _ in range(3):
        output = model(pixels(4, 3, 32, 32))
        output.loss.backward()
