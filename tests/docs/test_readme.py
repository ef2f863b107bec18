"""Every code block of the README runs: Python as it stands, commands with fewer steps and with data that is at hand."""

import importlib.metadata
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
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
    assert [line.partition("  # ")[2] for line in block.splitlines() if "print" in line] == done.stdout.splitlines()
    if "reconstruction.png" in block:  # that which the README shows, beside the original
        shown = Image.open(REPOSITORY / "docs" / "images" / "cat_reconstruction.png")
        left, right = (np.asarray(shown.crop((x, 0, x + 256, 256)), dtype=float) for x in (0, 264))
        names = ("docs/images/cat.png", "reconstruction.png")
        original, made = (np.asarray(Image.open(workplace / name), dtype=float) for name in names)
        assert np.array_equal(left, original) and np.abs(right - made).mean() < 0.1


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(workplace, command, request, monkeypatch, hub):
    words = shlex.split(command.partition(" #")[0])
    if words[:2] == ["git", "clone"]:
        address = importlib.metadata.metadata("optvq_hf")["Home-page"]
        assert words[2:] == [address, "&&", "cd", address.rpartition("/")[2]]  # the blocks after it run in the clone
        return
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
        (workplace / "runs" / "mine").symlink_to(workplace / "runs" / "quickstart")  # as if the command before had run
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


def test_pictures_are_there():
    pictures = re.findall(r"!\[(.+?)\]\((docs/.*?)\)", (REPOSITORY / "README.md").read_text())
    assert len(pictures) == 3
    for _, path in pictures:
        with Image.open(REPOSITORY / path) as picture:
            assert picture.width > 500
