"""The distance that needs no download orders blur, noise and JPEG, and the page has the strengths that the script measures."""

import runpy
from pathlib import Path

import pytest
from PIL import Image
from skimage.data import chelsea, coffee

from optvq_hf.evaluation.feature_networks import load_network


REPOSITORY = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(REPOSITORY / "scripts" / "check_frechet.py"))


@pytest.mark.long
def test_stronger_degradations_are_further_away():
    photographs = [Image.fromarray(photograph) for photograph in (chelsea(), coffee())]
    crops = [
        photograph.crop((left, top, left + 128, top + 128))
        for photograph in photographs
        for left in (20, 120, 220)
        for top in (20, 150)
    ]
    distances = SCRIPT["measure"](crops, load_network("fd-efficientnet-lite0"))
    assert SCRIPT["orders_rightly"](distances), distances
    assert not SCRIPT["orders_rightly"]({"blur": [2.0, 1.0]})


def test_the_page_shows_what_the_script_measures():
    page = (REPOSITORY / "docs" / "evaluation.md").read_text()
    for name, unit, _, strengths in SCRIPT["DEGRADATIONS"]:
        [row] = [line for line in page.splitlines() if line.startswith(f"| {name} | ")]
        _, _, strength, figures, _ = (cell.strip() for cell in row.split("|"))
        assert strength == f"{unit} {', '.join(map(str, strengths))}"
        assert SCRIPT["orders_rightly"]({name: [float(figure) for figure in figures.split(", ")]})
