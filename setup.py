"""Adds the long description to setup.cfg, which has all else: the README, with links that work outside the repository."""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
REPOSITORY, PICTURES = "github.com/optvq-hf/optvq_hf", (".png", ".gif", ".svg", ".jpg")


def absolute(readme: str, version: str) -> str:
    """The README with its relative links and pictures, of Markdown and HTML, as addresses of the version's tag."""

    def replace(link: re.Match[str]) -> str:
        before, target = link.groups()
        path = ROOT / target.partition("#")[0]
        is_folder = not path.suffix and not path.is_file()  # folders of the repository are not in a source distribution
        kind = "raw" if path.suffix in PICTURES else "tree" if is_folder else "blob"
        return f"{before}https://{REPOSITORY}/{kind}/v{version}/{target}"

    return re.sub(r'(\]\(|(?:src|srcset|href)=")(?![a-z]+:|#)([^()"\s]+)(?=[)"])', replace, readme)


[VERSION] = re.findall(r'^__version__ = "(.+)"$', (ROOT / "src" / "optvq_hf" / "__init__.py").read_text(), re.MULTILINE)

setup(
    long_description=absolute((ROOT / "README.md").read_text(), VERSION),
    long_description_content_type="text/markdown",
)
