"""The pages in docs/: tables match the results they quote, code runs, commands parse, links of all documents resolve."""

import importlib
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from optvq_hf.commands.cli import COMMANDS, main
from optvq_hf.commands.compare import make_parser as make_comparison_parser
from optvq_hf.evaluation.studies import Comparison
from optvq_hf.parsing import parse_yaml


REPOSITORY = Path(__file__).parents[2]
PAGES = {path.name: path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md"))}
LINES = [
    line
    for page in PAGES.values()
    for block in re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
BLOCKS = [  # hub.md needs a published model, and has a test of its own
    pytest.param(block, id=f"{name}-{number}")
    for name, page in PAGES.items()
    if name != "hub.md"
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
]
DOCUMENTS = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "model_cards" / "README.md"]


def test_the_table_of_recipes_is_that_of_its_results():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "compare_recipes.py"))
    results = json.loads((REPOSITORY / "docs" / "recipe_comparison.json").read_text())
    rows = [script["format_row"](variant) for variant in results]
    lines = PAGES["training.md"].splitlines()
    start = lines.index(rows[0])
    assert lines[start : start + len(rows)] == rows and not lines[start + len(rows)].startswith("|")
    variants = [(name, flags, len(seeds)) for name, flags, seeds in script["VARIANTS"]]
    assert [(result["name"], result["flags"], len(result["runs"]) // 2) for result in results] == variants


def test_the_page_of_inputs_is_what_the_doors_answer():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "make_inputs_page.py"))
    assert script["make_page"]() == PAGES["inputs.md"]


def test_the_results_are_those_of_their_files():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "make_results_page.py"))
    assert script["make_page"]() == PAGES["results.md"]
    readme = (REPOSITORY / "README.md").read_text()
    assert script["put_table"](readme) == readme
    for study in script["ORDER"]:
        for name, results in script["read_results"](study).items():
            assert script["rows_of"](results) == results["rows"], f"{study}, {name}"


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "scripts" / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_studies_can_be_read(path, tmp_path):
    """Flags, rivals and their settings, in full and quick; sizes that all rivals have."""
    script = runpy.run_path(str(REPOSITORY / "scripts" / "reproduce.py"))
    study = parse_yaml(path.read_text())
    for flags in study["comparisons"].values():
        for quick in ({}, script["QUICK"]):
            words = script["words"](study.get("common", {}) | flags | quick, tmp_path)
            Comparison(*make_comparison_parser().parse(words))


@pytest.mark.parametrize("line", LINES)
def test_commands_can_be_read(line):
    words = shlex.split(line)
    if words[0] == "python":  # a script: its flags are in it, or in what examples share
        sources = [REPOSITORY / words[1], REPOSITORY / "scripts" / "examples" / "token_training.py"]
        known = re.findall(r'add_argument\("(--[\w-]+)"', "".join(source.read_text() for source in sources))
        assert {word for word in words if word.startswith("--")} <= set(known)
        if "--study" in words:
            assert (REPOSITORY / "scripts" / "studies" / f"{words[words.index('--study') + 1]}.yaml").is_file()
        return
    if words[0] == "torchrun":
        module = words.index("-m") + 1
        words = ["optvq", words[module].removeprefix("optvq_hf.commands."), *words[module + 1 :]]
    assert words[0] == "optvq" and words[1] in COMMANDS
    importlib.import_module(f"optvq_hf.commands.{words[1]}").make_parser().parse(words[2:])


@pytest.mark.parametrize("block", BLOCKS)
def test_python(workplace, block, new_process):
    done = new_process(block, cwd=workplace)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_resolve(document):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_the_readme_fits_in_one_sitting():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


def test_the_page_of_the_hub(hub, trained_folder, monkeypatch, new_process):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("your-name"))
    main(["publish", str(trained_folder), "your-name/optvq-quickstart"])
    [block] = re.findall(r"^```python\n(.*?)^```", PAGES["hub.md"], re.MULTILINE | re.DOTALL)
    script = f"import sys; sys.modules['optvq_hf'] = None\n{block}\nassert model.config.model_type == 'optvq'"
    done = new_process(script)
    assert done.returncode == 0, done.stderr
