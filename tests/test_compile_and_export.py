"""encode, decode and forward, compiled as one graph, exported, and run by onnxruntime."""

import copy

import onnxruntime
import pytest
import torch

from builders import BOTH, make, pixels, plain_config, vqgan_config
from grids import slow


class Tokenizer(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        encoded = self.model.encode(pixel_values, return_loss=False)
        return encoded.codes, encoded.latents


class Detokenizer(Tokenizer):
    def forward(self, codes):
        return self.model.decode(codes=codes).reconstruction


@BOTH
@pytest.mark.parametrize("assignment", ["nearest", slow("potentials")])
@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])  # the graph alone, and its kernels
@torch.no_grad()
def test_compiled_as_one_graph(config, assignment, backend):
    torch._dynamo.reset()
    config = copy.deepcopy(config)
    config.inference_assignment = assignment
    model, x = make(config), pixels(3, 3, 32, 32)
    expected = model.encode(x)
    encoded = torch.compile(model.encode, fullgraph=True, backend=backend)(x)
    assert encoded.codes.shape == expected.codes.shape
    # Compiled convolutions round latents otherwise; of the same latents, all codes are the same.
    torch.testing.assert_close(encoded.latents, expected.latents, rtol=1e-3, atol=1e-4)
    assert torch.equal(encoded.codes, model.quantizer(encoded.latents).codes)
    torch.testing.assert_close(encoded.quantizer_loss, expected.quantizer_loss, rtol=1e-3, atol=1e-4)
    decoded = torch.compile(model.decode, fullgraph=True, backend=backend)(codes=expected.codes).reconstruction
    torch.testing.assert_close(decoded, model.decode(codes=expected.codes).reconstruction, rtol=1e-4, atol=1e-4)


@BOTH
@torch.no_grad()
def test_exported(config, tmp_path):
    model, x = make(config), pixels(3, 3, 32, 32)
    encoded = model.encode(x)
    codes = encoded.codes
    for module, inputs, expected in (
        (Tokenizer(model), x, (codes, encoded.latents)),
        (Detokenizer(model), codes, model.decode(codes=codes).reconstruction),
    ):
        torch.export.save(torch.export.export(module, (inputs,)), tmp_path / "model.pt2")
        result = torch.export.load(tmp_path / "model.pt2").module()(inputs)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [plain_config(), slow(vqgan_config())], ids=["plain_cnn", "vqgan"])
@torch.no_grad()
def test_exported_for_any_batch_and_size(config):
    model, batch = make(config), torch.export.Dim("batch", min=1, max=4096)
    shapes = ({0: batch, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    exported = torch.export.export(Tokenizer(model), (pixels(3, 3, 32, 32),), dynamic_shapes=shapes)
    for shape in ((2, 3, 32, 32), (5, 3, 48, 40)):
        codes, latents = exported.module()(pixels(*shape))
        torch.testing.assert_close(latents, model.encode(pixels(*shape)).latents, rtol=1e-3, atol=1e-4)
        assert torch.equal(codes, model.quantizer(latents).codes)
    exported = torch.export.export(
        model, (pixels(3, 3, 32, 32),), {"return_loss": True}, dynamic_shapes=(*shapes, None)
    )
    output = exported.module()(pixels(5, 3, 32, 32), return_loss=True)
    torch.testing.assert_close(output["loss"], model(pixels(5, 3, 32, 32), return_loss=True).loss, rtol=1e-3, atol=1e-4)
    codes = model.encode(pixels(3, 3, 32, 32)).codes
    exported = torch.export.export(Detokenizer(model), (codes,), dynamic_shapes=({0: batch},))
    assert exported.module()(codes[:2]).shape == (2, 3, 32, 32)


def run_by_onnxruntime(module, example, path):
    """The module exported for any batch, as a function of a tensor."""
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(module.eval(), (example,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    assert given.shape == ["batch", *example.shape[1:]]
    return lambda inputs: [torch.from_numpy(output) for output in session.run(None, {given.name: inputs.numpy()})]


@pytest.mark.parametrize("config", [plain_config(), slow(vqgan_config())], ids=["plain_cnn", "vqgan"])
@pytest.mark.parametrize("assignment", ["nearest", slow("potentials")])
@torch.no_grad()
def test_onnx(config, assignment, tmp_path):
    """The codes of the model; of equal codes the first. (Near-ties may fall otherwise: latents are rounded otherwise.)"""
    config = copy.deepcopy(config)
    config.inference_assignment = assignment
    model, x = make(config), pixels(7, 3, 32, 32)
    quantizer = model.quantizer
    quantizer.potentials.normal_(generator=torch.Generator().manual_seed(0))
    quantizer.cost_scale.fill_(1e3)
    for values in (quantizer.embedding.weight, quantizer.potentials):
        values[5] = values[3]
    codes = model.encode(x).codes
    assert 3 in codes and 5 not in codes and len(codes.unique()) > 20

    encode = run_by_onnxruntime(Tokenizer(model), x[:3], tmp_path / "tokenizer.onnx")
    decode = run_by_onnxruntime(Detokenizer(model), codes[:3], tmp_path / "detokenizer.onnx")
    for number in (1, 4, 7):
        found, latents = encode(x[:number])
        assert torch.equal(found, codes[:number]) and torch.equal(found, quantizer(latents).codes)
        [reconstruction] = decode(found)
        torch.testing.assert_close(reconstruction, model.decode(codes=found).reconstruction, rtol=0, atol=1e-4)
