"""Every code block of the README runs: Python as it stands, commands with fewer steps and with data that is at hand."""

import importlib.metadata
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from optvq_hf.commands.cli import main
from optvq_hf.commands.train import make_parser
from optvq_hf.publishing import reference_files


REPOSITORY = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line]


def test_blocks_are_of_known_kinds():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "bibtex"} and len(COMMANDS) >= 6


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python(workplace, block, new_process):
    done = new_process(block, cwd=workplace)
    assert done.returncode == 0, done.stderr
    if "reconstruction.png" in block:
        assert Image.open(workplace / "reconstruction.png").size == (32, 32)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(workplace, command, request, monkeypatch, hub):
    words = shlex.split(command.partition(" #")[0])
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=REPOSITORY, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    if words[0] == "pip":
        [extras] = re.findall(r"\[(.*)\]", words[-1])
        assert set(extras.split(",")) <= set(importlib.metadata.metadata("optvq_hf").get_all("Provides-Extra"))
        return
    if words[0] == "torchrun":  # several processes and ImageNet are more than a test has; the flags are read
        assert words[3:5] == ["-m", "optvq_hf.commands.train"]
        make_parser().parse(words[5:])
        return
    if words[:3] == ["accelerate", "launch", "-m"]:
        words = ["optvq", words[3].removeprefix("optvq_hf.commands."), *words[4:]]
    assert words[0] == "optvq"
    if words[1] == "publish":
        monkeypatch.setenv("HF_TOKEN", hub.add_user("your-name"))
        main(words[1:])
        return
    if words[1] == "convert":  # from the Hub: read a small model of the same kind
        source = str(request.getfixturevalue("published_folder"))
        monkeypatch.setattr(reference_files, "snapshot_download", lambda *_, **__: source)
        main(words[1:])
        return
    recipe = words[words.index("--config") + 1] if "--config" in words else ""
    if words[1] == "tokenize":
        main([*words[1:], "--max-images", "20"])
        return
    if words[1] == "evaluate":
        words += ["--max-images", "50", "--output-dir", str(workplace / "evaluation")]
    else:
        words += ["--max-steps", "2", "--batch-size", "4", "--report-to", "none"]
    if "mnist" in recipe or "cifar10" in recipe:  # on the Hub: read images of about the same size
        words += ["--dataset", "fashion_mnist_sample"]
    if recipe and "--eval-split" not in words:
        words += ["--eval-split", "test[:20]"]
    if "--streaming" in words:
        words[words.index("--eval-split") + 1] = "test"
    main(words[1:])


def test_the_picture_is_there():
    [path] = re.findall(r"!\[.*\]\((.*)\)", (REPOSITORY / "README.md").read_text())
    with Image.open(REPOSITORY / path) as picture:
        assert picture.width > 500
