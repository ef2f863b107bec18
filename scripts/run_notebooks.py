"""Executes notebooks top to bottom, each in a kernel of its own, and saves what they put out.

python scripts/run_notebooks.py notebooks/*.ipynb
"""

import argparse
import base64
import io
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


# Where ipywidgets are missing tqdm warns, with a path of this machine, and bars would be saved as text.
ENVIRONMENT = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def run(path: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """The notebook with the outputs of its code, which runs in the notebook's folder.

    Raises:
        CellExecutionError: If a cell fails.
        CellTimeoutError: If a cell takes longer than `timeout` seconds.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        startup_timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=os.environ | ENVIRONMENT)
    notebook.metadata.language_info = {"name": "python"}  # of any version
    shrink_figures(notebook)
    return notebook


def shrink_figures(notebook: nbformat.NotebookNode) -> None:
    """Writes figures with few colours as a palette, with the same pixels: matplotlib spends four bytes on each."""
    for data in [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]:
        if "image/png" in data:
            picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
            palette = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
            same = palette.convert("RGB").tobytes() == picture.tobytes()
            file = io.BytesIO()
            (palette if same else picture).save(file, "PNG", optimize=True)
            data["image/png"] = base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK", help="Files that end in .ipynb")
    for path in parser.parse_args().notebooks:
        nbformat.write(run(path), path)
        print(f"{path}, {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
