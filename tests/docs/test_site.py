"""The site, which `make docs` builds: what conf.py makes of links and docstrings; the figures of the page of concepts."""

import json
import os
import re
import runpy
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
GITHUB = "https://github.com/optvq-hf/optvq_hf"


@pytest.fixture(scope="module")
def site() -> dict:
    """What conf.py defines; other tests of this process may still reach their Hub."""
    before = dict(os.environ)
    defined = runpy.run_path(str(DOCS / "conf.py"))
    assert dict(os.environ) == before
    return defined


@pytest.mark.parametrize(
    ("folder", "page_folder", "link", "expected"),
    [
        (DOCS, DOCS, "training.md#resuming", "training.md#resuming"),
        (DOCS, DOCS, "images/toy.gif", "images/toy.gif"),
        (DOCS / "api", DOCS / "api", "../solver.md", "../solver.md"),
        (DOCS, DOCS, "../scripts/examples/speech_codes.py", f"{GITHUB}/blob/main/scripts/examples/speech_codes.py"),
        (DOCS, DOCS, "../model_cards", f"{GITHUB}/tree/main/model_cards"),
        (DOCS, DOCS, "results/long/photos32.json", f"{GITHUB}/blob/main/docs/results/long/photos32.json"),
        (DOCS, DOCS, "results/rivals/mnist-rates.png", "results/rivals/mnist-rates.png"),
        (DOCS, DOCS, "results", f"{GITHUB}/tree/main/docs/results"),
        (DOCS, DOCS, "https://arxiv.org/abs/2412.15195", "https://arxiv.org/abs/2412.15195"),
        (DOCS, DOCS, "nowhere.txt", "nowhere.txt"),  # Sphinx warns
        (REPOSITORY, DOCS, "docs/models.md", "models.md"),
        (REPOSITORY, DOCS, "CONTRIBUTING.md#words", "contributing.md#words"),
        (REPOSITORY, DOCS, "LICENSE", f"{GITHUB}/blob/main/LICENSE"),
    ],
)
def test_links(site, folder, page_folder, link, expected):
    assert site["links_of_the_site"](f"a [b]({link}) c", folder, page_folder) == f"a [b]({expected}) c"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_pictures_are_of_the_site(site, page):
    """Behind the address of a page of GitHub a picture would be broken."""
    text = site["links_of_the_site"](page.read_text(), DOCS, DOCS)
    for path in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text):
        assert (DOCS / path).is_file(), path


@pytest.mark.parametrize(
    "page", [*sorted(DOCS.glob("*.md")), REPOSITORY / "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_links_say_what_they_lead_to(page):
    """File names say nothing on the site."""
    assert not re.findall(r"\[[^\]]*\.md\]\(", page.read_text())


def test_docstrings(site):
    read = site["read_docstring"]
    lines = [
        "Takes `x` of [`~OptVQModel.encode`], mean |a - b|; see [the paper](https://arxiv.org/abs/1).",
        "```python",
        "a | b",
        "```",
    ]
    read(None, "class", "name", None, None, lines)
    assert (
        lines[0]
        == r"Takes ``x`` of ``OptVQModel.encode``, mean \|a - b\|; see `the paper <https://arxiv.org/abs/1>`__."
    )
    assert (
        ".. code-block:: python" in lines and "    a | b" in lines and "```" not in "".join(lines).replace("``x``", "")
    )


def test_figures_of_the_concepts():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "make_concepts.py"))
    measured, figures = script["measure"](), json.loads((DOCS / "concepts.json").read_text())
    assert measured.keys() == figures.keys()
    for name, values in figures.items():
        for key, value in values.items():
            assert measured[name][key] == pytest.approx(value, rel=1e-2, abs=1e-4), (name, key)
    used, epsilon, balance = (figures[name] for name in ("codes used of 12", "usage by epsilon", "usage by balance"))
    errors = dict(zip(script["ROUNDS"], figures["marginal error by rounds"]["10"], strict=True))
    changed = figures["codes that change with the batch, in percent"]
    page = " ".join((DOCS / "concepts.md").read_text().split())
    for text in (
        f"Nearest codes use {used['nearest']} of them; transport, with the settings of the paper, uses {used['transport']}.",
        f"epsilon 1 uses {epsilon['1']:.0f} %",
        f"Epsilon 10, the default, uses {epsilon['10']:.0f} %",
        f"five of them leave {epsilon['100']:.0f} % in use",
        f"5 rounds leave a marginal error of {errors[5]:.2f}, 10 leave {errors[10]:.3f}, 20 leave {errors[20]:.4f}",
        f"{balance['0']:.0f} % at balance 0, {balance['0.1']:.0f} % at 0.1, {balance['0.5']:.0f} % at 0.5",
        f"| transport over the batch | {changed['transport over the batch']:.0f} % |",
        f"| nearest codes | {changed['nearest']:.0f} % |",
    ):
        assert text in page
    pictures = re.findall(r"images/(concepts_\w+\.png)", page)
    assert len(pictures) == 4 and all((DOCS / "images" / name).is_file() for name in pictures)
