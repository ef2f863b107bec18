"""The site: `make docs` builds it from the pages of this folder, and the reference from docstrings. Warnings are errors."""

import os
import re
from pathlib import Path
from typing import Any

import optvq_hf


DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
BRANCH = "https://github.com/optvq-hf/optvq_hf/{kind}/main/{path}"

project, author, copyright = "optvq_hf", "The optvq_hf authors", "the optvq_hf authors"
version = release = optvq_hf.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"optvq_hf {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {
    "source_repository": "https://github.com/optvq-hf/optvq_hf/",
    "source_branch": "main",
    "source_directory": "docs/",
}

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

maximum_signature_line_length = 90  # longer ones have one argument a line
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True

# Files of the repository that are pages of the site.
PAGES = {ROOT / "CONTRIBUTING.md": DOCS / "contributing.md", ROOT / "CHANGELOG.md": DOCS / "changelog.md"}


def links_of_the_site(text: str, folder: Path, page_folder: Path) -> str:
    """A text with its relative links as the site needs them: to its own pages, or to the repository for everything else.

    Args:
        folder: Where the text lies, to which its links are relative.
        page_folder: That of the page which shows it.
    """

    def replace(link: re.Match[str]) -> str:
        target, anchor = link.groups()
        path = (folder / target).resolve()
        path = PAGES.get(path, path)
        if path.is_relative_to(DOCS) and path.suffix in (".md", ".png", ".gif"):
            return f"]({os.path.relpath(path, page_folder)}{anchor})"
        if not path.exists():
            return link[0]  # Sphinx warns
        kind = "tree" if path.is_dir() else "blob"
        return f"]({BRANCH.format(kind=kind, path=path.relative_to(ROOT).as_posix())}{anchor})"

    return re.sub(r"\]\((?![a-z]+:|#)([^()#\s]+)(#[^()\s]*|)\)", replace, text)


def read_page(app: Any, name: str, source: list[str]) -> None:
    """Mends the links of a page."""
    folder = (DOCS / name).parent
    source[0] = links_of_the_site(source[0], folder, folder)


def read_included(app: Any, path: Path, parent: str, source: list[str]) -> None:
    """Mends the links of a file that a page includes; `path` is relative to the folder of the sources."""
    source[0] = links_of_the_site(source[0], (DOCS / path).resolve().parent, (DOCS / parent).parent)


def read_docstring(app: Any, what: str, name: str, object: Any, options: Any, lines: list[str]) -> None:
    """Turns the Markdown of docstrings, as transformers writes it, into reStructuredText."""
    parts = re.split(r"(```\w+\n.*?```)", "\n".join(lines), flags=re.DOTALL)  # every second one is code
    parts[::2] = map(_prose, parts[::2])
    parts[1::2] = map(_code_block, parts[1::2])
    lines[:] = "".join(parts).split("\n")


def read_signature(
    app: Any, what: str, name: str, object: Any, options: Any, signature: str | None, returned: str
) -> Any:
    """Leaves the fields that every configuration of transformers has out of ours."""
    if name == "optvq_hf.OptVQConfig" and signature:
        return f"(*, {signature.partition('*, ')[2]}", returned
    return None


def _prose(text: str) -> str:
    text = re.sub(r"(?<!`)\[?`~?\.?([^`\n]+)`\]?(?!`)", r"``\1``", text)
    text = re.sub(r"(?<!`)\[([^\[\]\n]+)\]\((https?:[^()\s]+)\)", r"`\1 <\2>`__", text)
    outside = re.split(r"(``.*?``)", text)
    outside[::2] = [part.replace("|", r"\|") for part in outside[::2]]  # absolute values, not substitutions
    return "".join(outside)


def _code_block(fenced: str) -> str:
    first, *lines, _ = fenced.splitlines()
    code = "\n".join(f"    {line}" for line in lines)
    return f"\n.. code-block:: {first.removeprefix('```')}\n\n{code}\n"


def setup(app: Any) -> None:
    """Called by Sphinx. Nothing is downloaded or counted while it imports the package."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    app.connect("source-read", read_page)
    app.connect("autodoc-process-signature", read_signature)
    app.connect("include-read", read_included)
    # Before napoleon, which reads what this writes.
    app.connect("autodoc-process-docstring", read_docstring, priority=100)
