"""Adds the long description to setup.cfg, which has all else: the README, with links that work outside the repository."""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
REPOSITORY = "github.com/optvq-hf/optvq_hf"


def absolute(readme: str, version: str) -> str:
    """The README with its relative links and pictures as addresses of the version's tag; links within it stay."""

    def replace(link: re.Match[str]) -> str:
        mark, text, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        kind = "raw" if mark else "tree" if (ROOT / target.partition("#")[0]).is_dir() else "blob"
        return f"{mark}[{text}](https://{REPOSITORY}/{kind}/v{version}/{target})"

    return re.sub(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)", replace, readme)


[VERSION] = re.findall(r'^__version__ = "(.+)"$', (ROOT / "src" / "optvq_hf" / "__init__.py").read_text(), re.MULTILINE)

setup(
    long_description=absolute((ROOT / "README.md").read_text(), VERSION),
    long_description_content_type="text/markdown",
)
