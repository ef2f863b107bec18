"""What is installed is complete: it runs from a wheel, in a folder that has nothing of the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]


def test_a_wheel_runs_elsewhere(tmp_path, new_process):
    source = tmp_path / "source"  # building writes into it
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    shutil.rmtree(source)
    package = REPOSITORY / "src" / "optvq_hf"
    files = [path for folder in (package, package / "recipes") for path in folder.rglob("*.*") if path.suffix != ".pyc"]
    here = [path.relative_to(REPOSITORY / "src") for path in files]
    assert Path("optvq_hf/recipes/mnist.yaml") in here
    assert not [path for path in here if not (installed / path).exists()]

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
