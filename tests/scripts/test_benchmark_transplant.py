"""The transplant benchmark: its figures are those of the page, and it runs from the autoencoder's training to the table."""

import json
import runpy
from pathlib import Path

import PIL.Image
import pytest

from builders import noise


REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "docs" / "results" / "transplant"


def script(name):
    return runpy.run_path(str(REPOSITORY / "scripts" / name))


def test_the_page_has_the_figures_of_its_results():
    results = json.loads((RESULTS / "results.json").read_text())
    page = " ".join((REPOSITORY / "docs" / "transplant.md").read_text().split())
    module = script("benchmark_transplant.py")
    assert " ".join(module["table"](results).split()) in page
    assert module["describe"](results) in page
    assert set(results["rivals"]) == set(module["TITLES"])
    assert (RESULTS / "reconstructions.png").stat().st_size > 10_000


@pytest.mark.long
def test_from_an_autoencoder_to_the_table(tmp_path, monkeypatch, fresh_run, capsys):
    for split, number in (("train", 6), ("test", 8)):
        (tmp_path / "images" / split).mkdir(parents=True)
        for image in range(number):
            PIL.Image.fromarray(noise(3, 24, image)).save(tmp_path / "images" / split / f"{image}.png")
    of_data = ["--dataset", str(tmp_path / "images")]
    vae = ["--output-dir", str(tmp_path / "vae"), "--image-size", "64", "--max-steps", "1", "--batch-size", "2"]
    monkeypatch.setattr("sys.argv", ["train_autoencoder_kl.py", *of_data, *vae])
    script("examples/train_autoencoder_kl.py")["main"]()
    out = ["--vae", str(tmp_path / "vae"), "--output-dir", str(tmp_path / "out")]
    sizes = {
        "resize": 16,
        "image-size": 16,
        "crops": 0,
        "codebook-size": 16,
        "quantizer-steps": 4,
        "quantizer-batch": 2,
    }
    sizes |= {"decoder-steps": 1, "decoder-batch": 2, "max-images": 4}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["benchmark_transplant.py", *of_data, *out, *flags])
    module = script("benchmark_transplant.py")
    module["main"]()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert module["table"](results) in capsys.readouterr().out
    assert set(results["rivals"]) == set(module["TITLES"]) and results["num_images"] == 4
    assert set(results["steps_per_second"]) == {"latents", "images"}
    for rival in results["rivals"].values():
        assert rival["decoder"]["mse"] > 0 and rival["quantizer"]["mse"] != rival["decoder"]["mse"]
    assert (tmp_path / "out" / "reconstructions.png").is_file()
