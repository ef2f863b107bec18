"""The `optvq` console script: which commands there are, and what it does not import to say so."""

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import optvq_hf
from optvq_hf.commands import cli


REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "torchvision", "numpy")


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def imported_by(argv: list[str]) -> list[str]:
    """Those of the heavy libraries that a call, which may exit, has imported."""
    script = (
        "import sys\n"
        "from optvq_hf.commands.cli import main\n"
        f"try: main({argv!r})\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    return eval(run("-c", script).splitlines()[-1])


@pytest.mark.parametrize("argv", [["--help"], ["--version"], [], ["fly"]])
def test_the_console_script_imports_nothing_heavy(argv):
    assert imported_by(argv) == []


@pytest.mark.parametrize("argv", [["--help"], ["--no-such-flag"]])
@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - {"train"}))
def test_the_help_of_a_command_needs_no_torch(command, argv):
    assert set(imported_by([command, *argv])) <= {"transformers", "numpy"}


def test_the_help_of_training_reads_no_data():
    """Its flags are those of OptVQConfig too, which needs transformers and torch."""
    assert not set(imported_by(["train", "--help"])) & {"datasets", "torchvision"}


def test_the_version_is_said_once(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"optvq_hf {optvq_hf.__version__}\n"
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: optvq_hf.__version__"


def test_python_m():
    assert run("-m", "optvq_hf", "--version") == f"optvq_hf {optvq_hf.__version__}\n"
    assert run("-m", "optvq_hf", "--help").startswith("usage: optvq COMMAND")
