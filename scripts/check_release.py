"""Builds the wheel and the source distribution, and checks them as a user gets them.

    python scripts/check_release.py --output-dir dist
    python scripts/check_release.py --output-dir dist --tag v1.0.0

Checked are the files in both, the version in all papers, the metadata with the README as the index shows it, and the wheel
installed in an empty environment, where it finds its dependencies and nothing of the checkout.
"""

import argparse
import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "optvq_hf"
PAPERS = {
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "setup.cfg",
    "setup.py",
}
WRITTEN_BY_SETUPTOOLS = {
    "PKG-INFO",
    "dependency_links.txt",
    "entry_points.txt",
    "requires.txt",
    "top_level.txt",
    "SOURCES.txt",
}
OF_A_WHEEL = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}

# Runs in the empty environment. Nothing is downloaded.
TRIAL = """
import sys, torch, optvq_hf
from optvq_hf.commands.parser import RECIPES
if not optvq_hf.__file__.startswith(sys.prefix):
    sys.exit(f"imported {optvq_hf.__file__}, which is not of the wheel")
assert "quickstart" in RECIPES
quantizer = optvq_hf.OptVQQuantizer(codebook_size=16, dim=8)
output = quantizer(torch.randn(4, 8, 5, 5))
assert torch.equal(quantizer.lookup(output.codes), output.quantized)
print("quantized in", sys.prefix)
"""


def source_files() -> set[str]:
    """The files of the package in the checkout, as paths from `src`."""
    source = REPOSITORY / "src"
    walk = os.walk(source / PACKAGE, followlinks=True)  # the folder of recipes is a link
    paths = [Path(folder, name).relative_to(source) for folder, _, names in walk for name in names]
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def version_of_papers() -> str:
    """The version, which package, citation and changelog must agree on."""
    patterns = {
        f"src/{PACKAGE}/__init__.py": r'^__version__ = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## (\S+)",
    }
    found = {name: re.findall(pattern, (REPOSITORY / name).read_text(), re.M)[0] for name, pattern in patterns.items()}
    if len(set(found.values())) > 1:
        raise ValueError(f"versions differ: {', '.join(f'{version} in {name}' for name, version in found.items())}")
    return found["CITATION.cff"]


def check_tag(tag: str, version: str) -> None:
    """Raises ValueError unless a tag is that of the version, and the changelog says on which day it is released."""
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag}, the version {version}")
    [heading, *_] = re.findall(r"^## (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    if not re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", heading):
        raise ValueError(
            f"CHANGELOG.md has the heading {heading!r}: a release has its day there, {version} - YYYY-MM-DD"
        )


def check_wheel(path: Path, version: str) -> None:
    """Raises ValueError unless a wheel holds exactly the package and its metadata, of this version."""
    with zipfile.ZipFile(path) as archive:
        info = f"{PACKAGE}-{version}.dist-info"
        _compare(path, set(archive.namelist()), source_files() | {f"{info}/{name}" for name in OF_A_WHEEL})
        _check_metadata(path, archive.read(f"{info}/METADATA").decode(), version)


def check_sdist(path: Path, version: str) -> None:
    """Raises ValueError unless a source distribution holds exactly what a wheel is built from, of this version."""
    root = f"{PACKAGE}-{version}"
    expected = {*PAPERS, "PKG-INFO", *(f"src/{name}" for name in source_files())}
    expected |= {f"src/{PACKAGE}.egg-info/{name}" for name in WRITTEN_BY_SETUPTOOLS}
    with tarfile.open(path) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
        _compare(path, found, expected)
        metadata = archive.extractfile(f"{root}/PKG-INFO")
        assert metadata is not None
        _check_metadata(path, metadata.read().decode(), version)


def _compare(path: Path, found: set[str], expected: set[str]) -> None:
    for names, problem in ((expected - found, "lacks"), (found - expected, "holds, and should not,")):
        if names:
            raise ValueError(f"{path.name} {problem} {', '.join(sorted(names))}")


def _check_metadata(path: Path, text: str, version: str) -> None:
    metadata = email.message_from_string(text)
    if metadata["Version"] != version:
        raise ValueError(f"{path.name} is of version {metadata['Version']}, not {version}")
    relative = re.findall(r'(?:\]\(|(?:src|srcset|href)=")(?![a-z]+:|#)([^()"]*)', str(metadata.get_payload()))
    if relative:
        raise ValueError(f"{path.name}: links of the README lead nowhere on the index: {', '.join(relative)}")


def check_installation(wheel: Path) -> None:
    """Installs the wheel in an empty environment, which borrows the dependencies of this one, and uses it there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        _run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
        places = _run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        (Path(places) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        print(_run(str(python), "-", cwd=folder, input=TRIAL), end="")
        for words in (["--version"], ["train", "--help"]):
            print(_run(str(Path(folder) / "bin" / "optvq"), *words, cwd=folder).splitlines()[0])


def _run(*command: str, cwd: str | Path = REPOSITORY, input: str | None = None) -> str:
    # Not by PYTHONPATH, which may lead to the checkout.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, check=True, cwd=cwd, env=environment, input=input, stdout=subprocess.PIPE, text=True)
    return done.stdout


def main() -> None:
    """Builds, checks, and prints what was checked; ends with code 1 at the first fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="dist", help="Empty or new folder for wheel and source distribution")
    parser.add_argument("--tag", help="Tag of the release, v and the version")
    parser.add_argument("--no-isolation", action="store_true", help="Build with the setuptools that is installed")
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir).resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    try:
        version = version_of_papers()
        if arguments.tag is not None:
            check_tag(arguments.tag, version)
        flags = ["--no-isolation"] if arguments.no_isolation else []
        _run(sys.executable, "-m", "build", "--outdir", str(folder), *flags, str(REPOSITORY))
        [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
        check_wheel(wheel, version)
        check_sdist(sdist, version)
        print(_run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)), end="")
        check_installation(wheel)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"check_release.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    for path in (wheel, sdist):
        print(f"{path.stat().st_size:12,}  {path}")


if __name__ == "__main__":
    main()
