"""The `optvq` console script: which commands there are, and what it does not import to say so."""

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import optvq_hf
from optvq_hf.commands import cli


REPOSITORY = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "datasets", "accelerate", "torchvision", "numpy"}


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_help_and_wrong_words_import_nothing_heavy():
    """Of the program and of every command, whose flags are read in a fraction of a second."""
    words = [["--help"], ["--version"], [], ["help"], ["fly"]]
    words += [[command, word] for command in cli.COMMANDS for word in ("--help", "--help-all", "--no-such-flag")]
    script = (
        "import sys\n"
        "from optvq_hf.commands.cli import main\n"
        f"for words in {words!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        f"    assert not sys.modules.keys() & {HEAVY!r}, words\n"
    )
    assert run("-c", script).count("usage: optvq ") == 3 + 2 * len(cli.COMMANDS)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help-all"]])
def test_a_reader_that_goes_early_is_no_error(words):
    command = [sys.executable, "-m", "optvq_hf", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.parametrize("start", ["optvq_hf", "optvq_hf.commands.train"])
def test_an_interruption_of_the_imports_is_one_line(start):
    """Ctrl-C in the seconds before a command has read its data: no stack trace."""
    script = (
        "import os, runpy, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"sys.argv[1:] = {['train'] if start == 'optvq_hf' else []!r} + ['--dataset', 'fashion_mnist_sample']\n"
        f"runpy.run_module({start!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "optvq train: interrupted\n"


def test_the_version_is_said_once(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"optvq_hf {optvq_hf.__version__}\n"
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: optvq_hf.__version__"


def test_python_m():
    assert run("-m", "optvq_hf", "--version") == f"optvq_hf {optvq_hf.__version__}\n"
    assert run("-m", "optvq_hf", "--help").startswith("usage: optvq COMMAND")
