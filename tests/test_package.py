"""What is installed is complete: it runs from a wheel, in a folder that has nothing of the checkout."""

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import optvq_hf


REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def check() -> dict:
    return runpy.run_path(str(REPOSITORY / "scripts" / "check_release.py"))


@pytest.fixture(scope="module")
def sdist(check, tmp_path_factory) -> Path:
    """Built as the workflow builds it, but with the setuptools that is installed."""
    source = tmp_path_factory.mktemp("source")  # building writes into it
    ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=ignored)
    for name in check["PAPERS"]:
        shutil.copy(REPOSITORY / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, source / "dist"], check=True, cwd=source, capture_output=True)
    [path] = (source / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    """Built from the source distribution alone."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    source = sdist.parent / sdist.name.removesuffix(".tar.gz")
    subprocess.run([*build, "--wheel-dir", sdist.parent, source], check=True)
    [path] = sdist.parent.glob("*.whl")
    return path


def test_wheel_and_source_distribution_hold_what_they_should(check, sdist, wheel, tmp_path):
    check["check_sdist"](sdist, optvq_hf.__version__)
    check["check_wheel"](wheel, optvq_hf.__version__)
    assert {"optvq_hf/recipes/mnist.yaml", "optvq_hf/py.typed"} <= check["source_files"]()
    with pytest.raises(ValueError, match="whl lacks optvq_hf-0.1.0.dist-info/METADATA"):
        check["check_wheel"](wheel, "0.1.0")
    wrong = shutil.copy(wheel, tmp_path)
    with zipfile.ZipFile(wrong, "a") as archive:
        archive.writestr("tests/test_something.py", "")
    with pytest.raises(ValueError, match=r"whl holds, and should not, tests/test_something\.py$"):
        check["check_wheel"](Path(wrong), optvq_hf.__version__)


def test_the_index_shows_the_readme_with_links_that_lead_somewhere(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"optvq_hf-{optvq_hf.__version__}.dist-info/METADATA").decode()
    tag, readme = f"v{optvq_hf.__version__}", (REPOSITORY / "README.md").read_text()
    address = "https://github.com/optvq-hf/optvq_hf"
    relative = re.findall(r'(?:\]\(|src="|srcset="|href=")(?![a-z]+:|#)([^()"\s]+)', readme)
    assert len(relative) > 10
    for target in relative:
        is_folder = (REPOSITORY / target).is_dir()
        kind = "raw" if target.endswith((".png", ".gif", ".svg", ".jpg")) else "tree" if is_folder else "blob"
        assert f"{address}/{kind}/{tag}/{target}" in metadata, target
    assert f"/tree/{tag}/" in metadata and f"/blob/{tag}/" in metadata


def test_the_papers_have_one_version(check):
    assert check["version_of_papers"]() == optvq_hf.__version__
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="versions differ: .*9.9 in CITATION"):
        read = Path.read_text
        patch.setattr(Path, "read_text", lambda path: read(path) if path.suffix != ".cff" else "\nversion: 9.9\n")
        check["version_of_papers"]()


@pytest.mark.parametrize("heading", ["1.0 - unreleased", "1.0", "1.0 - 2026-1-2"])
def test_a_tag_is_that_of_a_version_with_its_day(check, heading, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: f"# Changelog\n\n## {heading}\n\n## 0.9 - 2025-01-01\n")
    with pytest.raises(ValueError, match=f"the heading '{heading}': a release has its day there, 1.0 - YYYY-MM-DD"):
        check["check_tag"]("v1.0", "1.0")
    with pytest.raises(ValueError, match="the tag is v1.1, the version 1.0"):
        check["check_tag"]("v1.1", "1.0")
    monkeypatch.setattr(Path, "read_text", lambda path: "## 1.0 - 2026-01-02\n")
    check["check_tag"]("v1.0", "1.0")


@pytest.mark.slow
def test_the_empty_environment_has_nothing_of_the_checkout(check, wheel, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
    check["check_installation"](wheel)
    assert f"optvq_hf {optvq_hf.__version__}\nusage: optvq train" in capsys.readouterr().out


def test_a_wheel_runs_elsewhere(wheel, tmp_path, new_process):
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import optvq_hf; from optvq_hf.commands.cli import main\n"
        "assert optvq_hf.__file__.startswith(sys.argv[1]), optvq_hf.__file__\n"
        "main(['train', '--config', 'quickstart', '--max-steps', '2', '--batch-size', '8', '--report-to', 'none',"
        "'--eval-split', 'test[:20]'])\n"
        "main(['evaluate', '--model', 'runs/quickstart', '--dataset', 'fashion_mnist_sample', '--max-images', '20',"
        "'--overwrite'])\n"
        "main(['publish', 'runs/quickstart', 'your-name/quickstart', '--dry-run'])\n"
    )
    (tmp_path / "elsewhere").mkdir()
    done = new_process(script, installed, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing was sent" in done.stdout
