import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassError

from optvq_hf import OptVQConfig
from optvq_hf.configuration_fields_optvq import OptVQFields


def test_defaults_are_the_papers_imagenet_model():
    config = OptVQConfig()
    assert (config.downsample_factor, config.head_dim, config.latent_size, config.tokens_per_image) == (16, 64, 16, 256)


def test_the_class_tells_what_every_field_is_for():
    text = OptVQConfig.__doc__ or ""
    described = re.findall(r"^    (\w+): [A-Z3\"`]", text.partition("\nArgs:\n")[2], re.MULTILINE)
    assert described == list(OptVQFields.__dataclass_fields__) and "\nAttributes:\n" in text


def test_plain_cnn_has_factor_four_whatever_the_width_fields():
    config = OptVQConfig(backbone="plain_cnn", image_size=32, channel_multiplier=(1, 1), base_channels=5)
    assert (config.downsample_factor, config.latent_size) == (4, 8)


def test_round_trip_of_every_field(tmp_path):
    config = OptVQConfig(
        image_size=64,
        num_channels=1,
        base_channels=32,
        channel_multiplier=(1, 2, 2),
        num_res_blocks=1,
        attn_resolutions=(16, 8),
        attn_image_size=128,
        mid_block_add_attention=False,
        norm_num_groups=16,
        dropout=0.1,
        latent_channels=24,
        use_quant_conv=False,
        normalize_latents=True,
        codebook_size=99,
        codebook_dim=24,
        num_codebook_heads=3,
        num_quantizers=2,
        use_codebook_projection=False,
        freeze_codebook=True,
        codebook_update="ema",
        codebook_ema_decay=0.9,
        training_assignment="soft",
        inference_assignment="potentials",
        sinkhorn_epsilon=20,
        sinkhorn_iterations=7,
        sinkhorn_balance=0.5,
        sinkhorn_warm_start=True,
        cost="cosine",
        cost_normalization="none",
        gradient_estimator="rotation",
        codebook_loss_type="l1",
        commitment_loss_weight=2,
        codebook_loss_weight=0.5,
    )
    config.save_pretrained(tmp_path)
    again = OptVQConfig.from_pretrained(tmp_path)
    own = list(OptVQFields.__dataclass_fields__)
    own.remove("autoencoder")  # of one backbone alone, in tests/publishing/test_diffusers_backbone.py
    assert len(own) == 35
    assert (again.codes_per_token, again.vocab_size) == (6, 6 * 99)
    for name in own:
        before, after = getattr(config, name), getattr(again, name)
        assert (list(before) == list(after)) if isinstance(before, tuple) else before == after, name
    OptVQConfig(double_z=True).save_pretrained(tmp_path)
    assert OptVQConfig.from_pretrained(tmp_path).encoder_channels == 512


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codebook_dim": 10}, "codebook_dim must be divisible by num_codebook_heads, got 10 and 4"),
        ({"image_size": 100}, "image_size must be divisible by the downsampling factor 16, got 100"),
        ({"base_channels": 40}, "multiple of 32.*got 40"),
        ({"norm_num_groups": 48}, "multiple of 48.*got 128"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"mid_block_add_attention": "yes"}, "mid_block_add_attention"),
        ({"double_z": True, "use_quant_conv": False}, "double_z needs .* use_quant_conv=True"),
        ({"double_z": True, "backbone": "plain_cnn", "image_size": 32}, 'double_z needs backbone="vqgan"'),
        ({"normalize_latents": 1}, "normalize_latents"),
        ({"channel_multiplier": ()}, "channel_multiplier must hold positive"),
        ({"sinkhorn_balance": 1.5}, "sinkhorn_balance.*"),
        ({"sinkhorn_epsilon": float("nan")}, "sinkhorn_epsilon"),
        ({"codebook_size": 0}, "codebook_size"),
        ({"codebook_size": "many"}, "codebook_size"),
        ({"backbone": "resnet"}, "backbone"),
        ({"training_assignment": "greedy"}, "training_assignment"),
        ({"codebook_loss_weight": -1.0}, "codebook_loss_weight"),
        ({"attn_image_size": 0}, "attn_image_size|greater than 0, got 0"),
        ({"codebook_update": "ema"}, "it needs use_codebook_projection=False"),
        ({"codebook_ema_decay": 1.0}, "codebook_ema_decay"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        OptVQConfig(**fields)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("codebok_size", "'codebook_size'"),
        ("inference_assigment", "'inference_assignment'"),
        ("epsilon", "'sinkhorn_epsilon'"),
        ("heads", None),
        ("top_k", None),
    ],
)
def test_unknown_fields(name, nearest, tmp_path):
    hint = f", did you mean {nearest}" if nearest else "$"
    with pytest.raises(StrictDataclassError, match=f"OptVQConfig has no field '{name}'{hint}"):
        OptVQConfig(**{name: 4})
    OptVQConfig().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=f"OptVQConfig has no field '{name}'{hint}"):
        OptVQConfig.from_pretrained(tmp_path, **{name: 4})


def test_unknown_entries_of_a_file(tmp_path, caplog):
    """A mistyped field is an error; what another library set before saving is kept, with a warning."""
    OptVQConfig().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "codebok_size": 4}))
    with pytest.raises(
        StrictDataclassError, match="OptVQConfig has no field 'codebok_size', did you mean 'codebook_size'"
    ):
        OptVQConfig.from_pretrained(tmp_path)
    for name in ("to_dict", "__class__"):
        (tmp_path / "config.json").write_text(json.dumps({**settings, name: 4}))
        with pytest.raises(StrictDataclassError, match=f"OptVQConfig has no field '{name}'"):
            OptVQConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "pad_token_id": 0, "use_cache": False}))
    config = OptVQConfig.from_pretrained(tmp_path)
    assert config.pad_token_id == 0
    assert [record.getMessage() for record in caplog.records] == [
        "config.json has entries that are not fields of OptVQConfig: pad_token_id"
    ]


def test_a_mistyped_field_cannot_be_set():
    config = OptVQConfig()
    with pytest.raises(
        StrictDataclassError, match="no field 'inference_assigment', did you mean 'inference_assignment'"
    ):
        config.inference_assigment = "sinkhorn"
    config.some_note = "transformers and other libraries keep attributes of their own here"


def test_what_transformers_saves_besides_fields_is_taken(tmp_path):
    config = OptVQConfig(
        architectures=["OptVQModel"], torch_dtype="bfloat16", name_or_path="x", output_hidden_states=True
    )
    config.auto_map, config.custom_pipelines = {"AutoModel": "modeling_optvq.OptVQModel"}, {}
    config.save_pretrained(tmp_path)
    assert OptVQConfig.from_pretrained(tmp_path).output_hidden_states is True


def test_the_image_size_may_change_and_attention_stays(tmp_path):
    config = OptVQConfig(image_size=256, attn_resolutions=(16,))
    config.save_pretrained(tmp_path)
    for other in (
        OptVQConfig.from_pretrained(tmp_path, image_size=32),
        OptVQConfig(**{**config.to_dict(), "image_size": 32}),
    ):
        assert (other.image_size, other.latent_size, other.attn_image_size) == (32, 2, 256)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["attn_image_size"]  # as saved by version 0.1
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert OptVQConfig.from_pretrained(tmp_path, image_size=32).attn_image_size == 256
