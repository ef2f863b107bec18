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
    for line in block.replace("\\\n", "").splitlines()
]
BLOCKS = [  # hub.md needs a published model, and has a test of its own
    pytest.param(block, id=f"{name}-{number}")
    for name, page in PAGES.items()
    if name != "hub.md"
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
]
DOCUMENTS = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "model_cards" / "README.md"]


def test_the_table_of_commands_has_all_there_are():
    listed = [line.split("|")[1] for line in PAGES["command_line.md"].splitlines() if line.startswith("| `optvq ")]
    assert sorted(re.findall(r"`optvq (\w+)`", " ".join(listed))) == sorted(COMMANDS)


def test_the_page_of_inputs_is_what_the_doors_answer():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "make_inputs_page.py"))
    assert script["make_page"]() == PAGES["inputs.md"]


def test_the_table_of_item_ids_is_that_of_its_file():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "benchmark_ids.py"))
    results = json.loads((REPOSITORY / "docs" / "results" / "ids" / "benchmark.json").read_text())
    assert script["table"](results) in PAGES["ids.md"]
    assert f"gave {results['items with a further code']} items a further code" in PAGES["ids.md"]
    for run in results["runs"].values():
        assert run["the same bytes as the first"] and f"{run['peak_memory'] / 1e9:.2f} GB" in PAGES["ids.md"]


def test_the_results_are_those_of_their_files():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "make_results_page.py"))
    assert script["make_page"]() == PAGES["results.md"]
    readme = (REPOSITORY / "README.md").read_text()
    assert script["put_tables"](readme) == readme
    for study in script["ORDER"]:
        for name, results in script["read_results"](study).items():
            rivals = [row["rival"] for row in results["rows"]]
            assert script["rows_of"](results, rivals) == results["rows"], f"{study}, {name}"


def test_the_page_says_which_runs_of_a_recipe_there_are(tmp_path):
    """Counted from the recipe as `optvq compare` reads it, and from the files."""
    page, words = (
        runpy.run_path(str(REPOSITORY / "scripts" / f"{name}.py")) for name in ("make_results_page", "reproduce")
    )
    counted = 0
    for study in page["ORDER"]:
        for name, results in page["read_results"](study).items():
            flags = page["flags_of"](study, name)
            arguments, _ = make_comparison_parser().parse(words["words"](flags, tmp_path))
            seeds = {"the search": arguments.seeds, "the confirmation": arguments.confirm_seeds}
            for part, of_part in seeds.items():
                if not of_part:
                    assert part not in page["describe"](results, flags)
                    continue
                rates = arguments.learning_rates if part == "the search" else [None]
                there = {
                    (run["rival"], run["learning_rate"] if part == "the search" else None, run["seed"])
                    for run in results["runs"]
                }
                wanted = {(rival, rate, seed) for rival in arguments.rivals for rate in rates for seed in of_part}
                assert f"{len(wanted & there)} of {len(wanted)} runs of {part}" in page["describe"](results, flags)
                counted += len(wanted)
            table = page["tables"](page["rows_of"](results, arguments.rivals))
            assert "diverged" not in table  # no run has, so far
    assert counted > 100


def test_figures_of_the_findings_are_those_of_the_tables():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "make_results_page.py"))
    tables = "".join(line for line in PAGES["results.md"].splitlines() if line.startswith("|"))
    for study in script["ORDER"]:
        for figure in re.findall(r"0\.\d{4}", script["read_study"](study).get("found", "")):
            assert figure in tables, f"{study}: {figure}"


def test_results_without_findings(tmp_path):
    """A study that was just run has none."""
    script = runpy.run_path(str(REPOSITORY / "scripts" / "make_results_page.py"))
    results = script["read_results"]("rivals")["mnist"]
    results["settings"] |= {"backbone": "vqgan", "latent_shift": 5.0, "first_dataset": "ylecun/mnist"}
    results["runs"][0]["versions"] = {"torch": "1.0"}
    globals_of = script["make_page"].__globals__
    globals_of["read_results"] = lambda study: {"photos256": results} if study == "photos256" else {}
    recipe = {name: value for name, value in script["read_study"]("photos256").items() if name != "found"}
    globals_of["read_study"] = lambda study: recipe
    page = script["make_page"]()
    assert "## Photographs of 256 pixels" in page and "Nothing is written of these results yet." in page
    assert "; backbone `vqgan`; latent shift `5.0`; first dataset `ylecun/mnist`. " in page
    assert "Runs had different versions: torch 1.0, 2." in page


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (["--copy", "photos32"], "--copy takes ID=PATH, with an ID of photos32, ylecun/mnist, zalando-"),
        (["--copy", "mnist=here"], "got 'mnist=here'"),
        (["--parallel", "0"], "parallel must be at least 1, got 0"),
    ),
)
def test_studies_that_cannot_be_started(words, message, tmp_path, monkeypatch, capsys):
    script = runpy.run_path(str(REPOSITORY / "scripts" / "reproduce.py"))
    monkeypatch.setattr("sys.argv", ["reproduce.py", "--study", "rivals", "--output-dir", str(tmp_path / "x"), *words])
    with pytest.raises(SystemExit):
        script["main"]()
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


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
        shared = ("token_training", "rival_quantizers", "semantic_ids")
        sources = [REPOSITORY / words[1], *(REPOSITORY / "scripts" / "examples" / f"{name}.py" for name in shared)]
        known = re.findall(r'add_argument\(\s*"(--[\w-]+)"', "".join(source.read_text() for source in sources))
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
    text = document.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert "![](" not in text  # pictures have a text for those who do not see them
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_the_readme_fits_in_one_sitting():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120


def test_the_page_of_the_hub(hub, trained_folder, monkeypatch, new_process):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("your-name"))
    main(["publish", str(trained_folder), "your-name/optvq-quickstart"])
    [block] = re.findall(r"^```python\n(.*?)^```", PAGES["hub.md"], re.MULTILINE | re.DOTALL)
    script = f"import sys; sys.modules['optvq_hf'] = None\n{block}\nassert model.config.model_type == 'optvq'"
    done = new_process(script)
    assert done.returncode == 0, done.stderr
