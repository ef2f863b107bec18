"""The notebooks: what is saved is small and whole, and running them again puts out the same."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest


REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
LARGEST = 150_000  # bytes, with outputs


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def put_out(cell: nbformat.NotebookNode) -> list[str]:
    """All that is printed, then kinds and texts of other outputs; without numbers, which other processors round otherwise."""
    printed = "".join(
        output.text for output in cell.outputs if output.output_type == "stream"
    )  # cut anywhere, by timing
    others = [output.data for output in cell.outputs if output.output_type != "stream"]
    texts = [printed, *(f"{sorted(data)} {data.get('text/plain')}" for data in others)]
    return [re.sub(r"[\d.\s]+", " ", text) for text in texts]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_notebooks(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = path.read_text()
    assert len(text) < LARGEST and not re.search(r"(?<![\w.])/(home|root|tmp|work|usr)/", text)
    for link in re.findall(r"(?:docs|scripts)/[\w/]+\.\w+", text):
        assert (REPOSITORY / link).is_file()


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_running_again_puts_out_the_same(path):
    saved = nbformat.read(path, as_version=4)
    notebook = runpy.run_path(str(REPOSITORY / "scripts" / "run_notebooks.py"))["run"](path, timeout=250)
    assert [put_out(cell) for cell in code_cells(notebook)] == [put_out(cell) for cell in code_cells(saved)]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 4
