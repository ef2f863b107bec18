"""What a person sees of the commands: help, suggestions, colour in a terminal and plain text elsewhere, completion."""

import importlib
import io
import re
import subprocess
import sys

import pytest

from optvq_hf.commands import cli, terminal
from optvq_hf.commands.completion import make_script
from optvq_hf.commands.evaluate import show_table
from optvq_hf.commands.usual_flags import USUAL_FLAGS
from optvq_hf.evaluation.tables import Row


def shown(capsys, *words: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == code
    return "".join(capsys.readouterr())


def flags_in(text: str) -> list[str]:
    return re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch):
    """Prints with a function of `terminal` to a terminal; returns what stands there."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def show(function, *arguments, **options) -> str:
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        function(*arguments, **options)
        return screen.getvalue()

    return show


@pytest.mark.parametrize("command", sorted(USUAL_FLAGS))
def test_help_shows_the_usual_flags_in_their_order(capsys, command):
    text = shown(capsys, command, "--help")
    usual = [f"--{name.replace('_', '-')}" for name in USUAL_FLAGS[command]]
    assert flags_in(text) == usual and len(usual) == len(set(usual)) == 10
    assert text.startswith(f"usage: optvq {command} [flags]\n")
    number = int(re.findall(rf"optvq {command} --help-all lists all (\d+) flags", text)[0])
    everything = flags_in(shown(capsys, command, "--help-all"))
    assert set(usual) < set(everything)
    assert number == len([flag for flag in everything if not flag.startswith(("--help", "--no-"))])


@pytest.mark.parametrize("command", sorted(cli.COMMANDS.keys() - USUAL_FLAGS))
def test_commands_with_few_flags_show_all(capsys, command):
    text = shown(capsys, command, "--help")
    assert text == shown(capsys, command, "--help-all") and 8 <= len(flags_in(text)) <= 14
    assert f"usage: optvq {command} " in text and "[flags]" in text


def test_all_flags_are_grouped(capsys):
    text = shown(capsys, "train", "--help-all")
    assert all(f"\n{group}:\n" in text for group in ("training", "optimization", "codebook", "data", "model"))


def test_the_console_script(capsys):
    for words in ([], ["help"], ["-h"], ["--help"], ["--help-all"]):
        cli.main(words)
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in cli.COMMANDS)
        assert all(f"\n  {code} " in text for code in (0, 1, 2, 130))
    assert shown(capsys, "help", "ids") == shown(capsys, "ids", "--help")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_top_help_fits_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert columns - 20 < max(map(len, lines)) < columns or columns == 200 and max(map(len, lines)) > 120
    words = " ".join(" ".join(lines).split())
    assert all(description in words for description in (*cli.COMMANDS.values(), *cli.EXIT_CODES.values()))


def test_the_help_of_training_says_when_its_defaults_hold(capsys):
    for flag in ("--help", "--help-all"):
        text = " ".join(shown(capsys, "train", flag).split())
        assert "Without --config, --model and --backbone, a recipe that fits the images" in text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tokenizer", r"unknown command 'tokenizer'; did you mean tokenize\?"),
        ("detokenise", r"unknown command 'detokenise'; did you mean detokenize\?"),
        ("fly", "unknown command 'fly'; commands are train, evaluate, "),
        ("--dataset", "unknown flag --dataset: flags come after a command"),
        ("", "unknown command ''; commands are train, evaluate, "),
    ],
)
def test_wrong_commands(capsys, word, message):
    text = shown(capsys, word, code=2)
    assert re.fullmatch(rf"optvq: error: {message}.*\(see optvq --help\)\n", text)


def test_a_terminal_shows_flags_in_colour(on_terminal):
    text = on_terminal(terminal.print_help, "usage: optvq fly\n\nwings:\n  --wing-span W  Metres (default: 2)\n")
    assert "\x1b[36m--wing-span\x1b[0m" in text and "\x1b[1mwings:\x1b[0m" in text
    assert re.sub(r"\x1b\[\d*m", "", text) == "usage: optvq fly\n\nwings:\n  --wing-span W  Metres (default: 2)\n"
    error = on_terminal(terminal.print_error, "optvq", "no [such] thing " + 40 * "long ")
    assert "\x1b[1;31merror:\x1b[0m no [such] thing" in error and error.count("\n") == 1


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_plain_text_where_it_is_wanted(on_terminal, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert on_terminal(terminal.print_error, "optvq", "no") == "optvq: error: no\n"
    assert on_terminal(terminal.print_markdown, "| a |\n| - |\n| **b** |") == "| a |\n| - |\n| **b** |\n"


def test_tables(on_terminal, capsys):
    rows = [Row("runs/[a]", "nearest", {"psnr": 20.5, "mse": 0.01}), Row("b", "sinkhorn", {"psnr": 7.25, "mse": 0.5})]
    show_table(rows, ["mse", "psnr"], "text")
    plain = capsys.readouterr().out
    assert plain.splitlines()[1].startswith("runs/[a] | nearest    | ")
    ruled = on_terminal(show_table, rows, ["mse", "psnr"], "text")
    assert "─" in ruled and "|" not in ruled
    words = re.findall(r"[^\s|]+", plain)
    assert re.findall(r"[^\s─]+", re.sub(r"\x1b\[\d*m", "", ruled)) == words and "runs/[a]" in words
    assert on_terminal(show_table, rows, ["mse"], "markdown").startswith("| model |")  # to be copied
    assert "|" not in on_terminal(terminal.print_markdown, "| a |\n| - |\n| b |")


def test_completion_in_bash(tmp_path):
    """The script in a real bash: commands, flags without their aliases, choices, recipes and paths."""
    (tmp_path / "optvq.bash").write_text(make_script("bash"))
    (tmp_path / "my_recipe.yaml").touch()
    (tmp_path / "my_folder").mkdir()
    lines = {
        "optvq ev": ["evaluate"],
        "optvq train --codebook-s": ["--codebook-size", "--codebook-start", "--codebook-start-batches"],
        "optvq train --backbone ": ["plain_cnn", "vqgan"],
        "optvq train --config m": ["mnist", "my_folder", "my_recipe.yaml"],
        "optvq train --output-dir my": ["my_folder"],
        "optvq evaluate --overwrite --max-im": ["--max-images"],
        "optvq publish --dry-run my": ["my_folder"],
    }
    script = "source ./optvq.bash\n"
    for line in lines:
        words = " ".join(f"'{word}'" for word in line.split(" "))
        script += (
            f"COMP_WORDS=({words}); COMP_CWORD={line.count(' ')}; _shtab_optvq 2>/dev/null; echo ${{COMPREPLY[@]}}\n"
        )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    completed = [sorted(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(lines, completed, strict=True)) == lines


def test_completion_of_a_shell_that_is_not_there(capsys, monkeypatch):
    assert "takes one of bash, zsh, tcsh" in shown(capsys, "--print-completion", code=2)
    assert shown(capsys, "--print-completion", "dos", code=2).endswith(", got 'dos'\n")
    cli.main(["--print-completion", "zsh"])
    assert capsys.readouterr().out.startswith("#compdef optvq")
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert 'run pip install "optvq_hf[completion]"' in shown(capsys, "--print-completion", "bash", code=1)


def test_what_completes_values_names_flags_that_exist():
    completion = importlib.import_module("optvq_hf.commands.completion")
    parsers = [importlib.import_module(f"optvq_hf.commands.{name}").make_parser() for name in cli.COMMANDS]
    known = {action.dest for parser in parsers for action in parser._actions}
    assert set(completion.FOLDERS + completion.FILES) <= known
