"""Weights that do not fit the configuration, and weights that accelerate moves to the CPU or the disk."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModel

from builders import BOTH, make, pixels, plain_config, vqgan_config
from optvq_hf import OptVQModel


# ---- weights that do not fit -----------------------------------------------------------------------------------------


def test_another_image_size_changes_no_layer(tmp_path):
    model = make(vqgan_config())  # attention at 16 x 16, for images of 32 x 32
    model.save_pretrained(tmp_path)
    x = pixels(2, 3, 16, 16)
    for size in (16, 64):
        again, info = OptVQModel.from_pretrained(tmp_path, image_size=size, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["missing_keys"] and again.config.image_size == size
        assert torch.equal(again.encode(x).codes, model.encode(x).codes)
        again.save_pretrained(tmp_path / str(size))
        assert torch.equal(OptVQModel.from_pretrained(tmp_path / str(size)).encode(x).codes, model.encode(x).codes)


@pytest.mark.parametrize(
    "fields", [{"attn_resolutions": [8]}, {"attn_resolutions": []}, {"use_codebook_projection": False}]
)
def test_unexpected_weights_are_an_error(tmp_path, fields):
    make(vqgan_config()).save_pretrained(tmp_path)
    for load in (OptVQModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"the checkpoint has \d+ weights that the model does not have \("):
            load(tmp_path, **fields)


@pytest.mark.parametrize("fields", [{"codebook_size": 48}, {"num_codebook_heads": 4}])
def test_a_replaced_codebook_is_new_in_everything(tmp_path, fields, caplog):
    model = make()
    model.train()(pixels(4, 3, 32, 32))
    model.save_pretrained(tmp_path)
    assert model.quantizer.num_updates == 1 and model.quantizer.potentials.any() and model.quantizer.cost_scale != 1
    again = OptVQModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **fields)
    made_anew = f"the codebook of {again.config.codebook_size} codes of width {again.config.head_dim}"
    assert [record.getMessage() for record in caplog.records if "made anew" in record.getMessage()] == [
        f"made anew: {made_anew}, with its projection and running state"
    ]
    quantizer = again.quantizer
    assert quantizer.num_updates == 0 and quantizer.cost_scale == 1
    assert not quantizer.potentials.any() and not quantizer.last_potentials.any()
    assert 0.8 < quantizer.embedding.weight.std() < 1.2
    assert not torch.equal(quantizer.projection.weight, torch.eye(again.config.head_dim))  # that of the old codes
    for ours, theirs in zip(again.encoder.parameters(), model.encoder.parameters()):
        assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        OptVQModel.from_pretrained(tmp_path, **fields)


def test_the_running_state_is_new_where_codes_or_features_are(tmp_path, caplog):
    model = make(plain_config(use_codebook_projection=False))
    model.train()(pixels(4, 3, 32, 32))
    model.save_pretrained(tmp_path)
    again = OptVQModel.from_pretrained(tmp_path, use_codebook_projection=True)
    assert torch.equal(again.quantizer.embedding.weight, model.quantizer.embedding.weight)
    assert again.quantizer.num_updates == 0 and again.quantizer.cost_scale == 1 and not again.quantizer.potentials.any()
    assert "made anew: quantizer.projection.bias, quantizer.projection.weight, with the running state" in caplog.text


# ---- weights elsewhere -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload", "little_memory", "disk"])
@BOTH
def test_an_offloaded_model(tmp_path, config, place):
    model, x = make(config), pixels(3, 3, 32, 32)
    model.train()(x)
    model.eval().save_pretrained(tmp_path)
    cpu, folder = torch.device("cpu"), str(tmp_path / "offloaded")
    if place == "little_memory":
        options = {"device_map": "auto", "max_memory": {"cpu": "40KB"}, "offload_folder": folder}
        again = OptVQModel.from_pretrained(tmp_path, **options)
    elif place == "disk":
        again = OptVQModel.from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=folder)
    else:
        again = OptVQModel.from_pretrained(tmp_path)
        cpu_offload(again, cpu) if place == "cpu_offload" else disk_offload(again, folder, cpu)
    assert again.quantizer.embedding.weight.is_meta
    for assignment in ("nearest", "potentials", "sinkhorn"):
        want, got = model.encode(x, assignment=assignment), again.encode(x, assignment=assignment)
        assert torch.equal(got.codes, want.codes) and torch.equal(got.quantized, want.quantized)
        assert torch.equal(again.decode(codes=got.codes).reconstruction, model.decode(codes=got.codes).reconstruction)
    assert torch.equal(again(x).reconstruction, model(x).reconstruction)
    assert torch.equal(again.get_codebook(), model.get_codebook())
