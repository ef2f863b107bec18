"""What the demo computes, on the clothes model and the pictures that ship with it."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from optvq_hf import OptVQConfig, OptVQImageProcessor, OptVQModel


REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(space):
    import picture_codes

    return picture_codes


@pytest.fixture
def clothes(demo):
    return demo.load(str(REPOSITORY / "model_cards" / "fashion_mnist"))


@pytest.fixture
def boot(demo, clothes, space):
    return demo.tokenize(clothes, Image.open(space / "examples" / "boot.png"), "nearest", 32)


@pytest.fixture
def pullover(demo, clothes, space):
    return demo.tokenize(clothes, Image.open(space / "examples" / "pullover.png"), "nearest", 32)


@pytest.mark.parametrize(
    ("file", "folder", "side"), (("boot.png", "fashion_mnist", 32), ("chelsea.jpg", "photos32", 64))
)
def test_examples_are_reconstructed(demo, space, file, folder, side):
    tokenizer = demo.load(str(REPOSITORY / "model_cards" / folder))
    for assignment in demo.ASSIGNMENTS:
        tokens = demo.tokenize(tokenizer, Image.open(space / "examples" / file), assignment, side)
        original, reconstruction = demo.input_picture(tokenizer, tokens), demo.decode(tokenizer, tokens.codes)
        assert tokens.codes.shape == (4, side // 4, side // 4) and reconstruction.size == original.size == (side, side)
        assert demo.psnr(original, reconstruction) > 25
    assert demo.psnr(original, original) == float("inf")


def test_an_edit_changes_its_tokens_alone(demo, clothes, boot):
    edited = demo.write_code(boot.codes, 1, 0, 7, 5, width=3)
    where = np.zeros(boot.codes.shape, bool)
    where[1, :2, 6:] = True  # cut off at the corner
    assert (
        (edited[where] == 5).all() and (edited[~where] == boot.codes[~where]).all() and (boot.codes[where] != 5).any()
    )
    before, after = (np.asarray(demo.decode(clothes, codes), int) for codes in (boot.codes, edited))
    assert (before != after)[:8, 24:].any() and (before == after)[24:, :8].all()


def test_mixtures_of_positions(demo, boot, pullover):
    mixed = [demo.mix_positions(boot.codes, pullover.codes, share) for share in (0, 0.25, 0.5, 1)]
    second = [(codes == pullover.codes).all(axis=0) & (pullover.codes != boot.codes).any(axis=0) for codes in mixed]
    assert (mixed[0] == boot.codes).all() and (mixed[3] == pullover.codes).all()
    assert second[2].sum() > second[1].sum() > 0 and (second[2] | ~second[1]).all()


def test_mixtures_of_vectors(demo, clothes, boot, pullover):
    ends = (boot.codes, pullover.codes)
    for share in (0, 1):
        assert (demo.mix_vectors(clothes, *ends, share, "nearest") == ends[share]).all()
    half, codebook = demo.mix_vectors(clothes, *ends, 0.5, "nearest"), clothes.model.get_codebook().detach()
    middle = (codebook[ends[0]] + codebook[ends[1]]) / 2
    nearest = torch.cdist(middle.flatten(0, 2), codebook).argmin(dim=1)
    assert (torch.from_numpy(half).flatten() == nearest).float().mean() > 0.99  # cdist rounds ties differently


def test_statistics(demo, clothes, boot):
    sizes = demo.statistics(clothes, boot)
    assert sizes["tokens"] == "8 x 8, of 4 codes in [0, 1,024)"
    assert sizes["bits"] == "2,560: 2.50 a pixel, 3.2 times fewer than 8-bit pixels have"
    codes = np.zeros((4, 8, 8), np.int64)
    codes[1], codes[2] = np.arange(64).reshape(8, 8), np.arange(8)
    expected = [("head 1", 1, 100 / 64, 1), ("head 2", 64, 100, 64), ("head 3", 8, 12.5, 8), ("head 4", 1, 100 / 64, 1)]
    for row, wanted in zip(demo.usage(clothes, codes), expected, strict=True):
        assert row[:2] == wanted[:2] and row[2:] == pytest.approx(wanted[2:])


def test_similar_codes_have_similar_colors(demo, clothes, boot):
    colors, codebook = demo.code_colors(clothes), clothes.model.get_codebook().detach()
    assert colors.shape == (1, 1024, 3) and colors.dtype == np.uint8
    painted = torch.cdist(torch.from_numpy(colors[0]).float(), torch.from_numpy(colors[0]).float())
    neighbours = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf).argmin(dim=1)
    assert painted.gather(1, neighbours[:, None]).mean() < painted.mean() / 5
    maps = demo.code_maps(clothes, boot.codes)
    assert len(maps) == 4 and maps[2].getpixel((3, 5)) == tuple(colors[0, boot.codes[2, 5, 3]])


def test_models_with_levels(demo, tmp_path):
    config = OptVQConfig(
        image_size=16, backbone="plain_cnn", base_channels=8, codebook_size=16, codebook_dim=8, num_codebook_heads=2,
        num_quantizers=2, latent_channels=16,
    )  # fmt: skip
    OptVQModel(config).save_pretrained(tmp_path)
    OptVQImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    tokenizer = demo.load(str(tmp_path))
    tokens = demo.tokenize(tokenizer, Image.new("RGB", (20, 30), "red"), "nearest", 16)
    names = [row[0] for row in demo.usage(tokenizer, tokens.codes)]
    assert names == ["level 1, head 1", "level 1, head 2", "level 2, head 1", "level 2, head 2"]
    assert demo.code_colors(tokenizer).shape == (2, 16, 3) and len(demo.code_maps(tokenizer, tokens.codes)) == 4
    mixed = demo.mix_vectors(tokenizer, tokens.codes, tokens.codes, 0.5, "nearest")
    assert mixed.shape == tokens.codes.shape and demo.decode(tokenizer, mixed).size == (16, 16)


def test_the_folder_can_be_pushed_as_a_space(space):
    readme = (space / "README.md").read_text()
    front = yaml.safe_load(readme.split("---")[1])
    lowest = re.search(r"gradio>=([\d.]+)", (REPOSITORY / "setup.cfg").read_text())
    assert (
        front["sdk"] == "gradio"
        and front["sdk_version"].startswith(lowest[1])
        and (space / front["app_file"]).is_file()
    )
    assert (space / "requirements.txt").read_text().startswith("optvq_hf @ git+https://github.com/optvq-hf/optvq_hf")
    source = ast.parse((space / "app.py").read_text())
    assigned = {ast.unparse(node.targets[0]): node.value for node in source.body if isinstance(node, ast.Assign)}
    examples, models = (ast.literal_eval(assigned[name]) for name in ("EXAMPLES", "MODELS"))
    files = {file for file, _, _ in examples.values()}
    assert files == {path.name for path in (space / "examples").iterdir()}
    assert all(f"`{file}`" in readme for file in files)  # with its licence
    for _, model, _ in examples.values():
        assert (REPOSITORY / "model_cards" / models[model] / "model.safetensors").is_file()
    assert set(front["models"]) == {f"optvq-hf/optvq-{folder}" for folder in models.values()}
