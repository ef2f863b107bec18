"""Command-line parsing: dataclasses, filled from a YAML recipe (`--config`) and from flags that override it."""

import argparse
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .dataclass_flags import add_flags, to_bool
from .suggestions import suggestion
from .terminal import print_error, print_help
from .usual_flags import NOTES, USUAL_FLAGS


RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))}


LONGEST_MESSAGE = 500  # characters
# What stands for no value in YAML.
NULLS = ("", "~", "null", "Null", "NULL")
LEADING_ZERO = re.compile(r"[-+]?0[0-9]")
HELP = {"help", argparse.SUPPRESS}  # where --help and --help-all would store


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any, and `--long-flag` without its alias `--long_flag`."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and not isinstance(action, argparse._StoreFalseAction)
        return super()._get_help_string(action) if has_default else action.help

    def _format_action_invocation(self, action: argparse.Action) -> str:
        twins = action.option_strings
        action.option_strings = [option for option in twins if "_" not in option]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = twins


class _HelpAll(argparse.Action):
    """The flag --help-all."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print_help(parser.format_help())
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Parser of one command.

    A wrong flag, recipe key or value ends with exit code 2 and one line that says what is wrong.

    Args:
        dataclass_types: Dataclasses whose fields are the flags.
        command: Name of the command.
        description: One line, for --help.
        positionals: Help of the positional arguments, by name, in their order.
    """

    def __init__(
        self,
        dataclass_types: Iterable[Any],
        command: str,
        description: str,
        positionals: dict[str, str] | None = None,
    ):
        super().__init__(
            prog=f"optvq {command}",
            description=description,
            epilog=NOTES.get(command),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self._dataclass_types = list(dataclass_types)
        for dataclass_type in self._dataclass_types:
            add_flags(self, dataclass_type)
        self.color = False  # of Python 3.14, which would be another rule than that of the other texts
        self.usage = " ".join(["%(prog)s", *(name.upper() for name in positionals or {}), "[flags]"])
        self._usual = USUAL_FLAGS.get(command)
        self._of_recipe: set[str] = set()
        self._positional_names = list(positionals or {})
        for name, text in (positionals or {}).items():
            self.add_argument(name, metavar=name.upper(), help=text)
        self.add_argument(
            "--config",
            metavar="FILE",
            help="YAML file with lines `flag_name: value` for any of these flags, or the name of a recipe that ships with the "
            f"package: {', '.join(RECIPES)}",
        )
        self.add_argument("--help-all", action=_HelpAll, help="Show all flags, by group, and exit")

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2 and one line."""
        message = " ".join(message.split())
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]}..."
        print_error(self.prog, f"{message} (see {self.prog} --help)")
        sys.exit(2)

    def print_help(self, file: Any = None) -> None:
        """Prints what --help shows: the usual flags; all, if the command has few."""
        print_help(self._format_usual_help() if self._usual else self.format_help(), file)

    def _format_usual_help(self) -> str:
        by_name = {action.dest: action for action in self._positive_actions()}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.start_section("usual flags")
        formatter.add_arguments([by_name[name] for name in self._usual or ()])
        formatter.end_section()
        formatter.add_text(self.epilog)
        formatter.add_text(f"{self.prog} --help-all lists all {len(by_name.keys() - HELP)} flags, by group.")
        return formatter.format_help()

    def _positive_actions(self) -> list[argparse.Action]:
        """All but the flags `--no-flag`."""
        return [action for action in self._actions if not isinstance(action, argparse._StoreFalseAction)]

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parses to one instance of each dataclass, then the positional arguments in their order."""
        argv = list(sys.argv[1:] if argv is None else argv)
        if self._positional_names:
            argv = [self._as_switch(*pair) for pair in zip(argv, [*argv[1:], ""])]
        for option, value in self._empty_values(argv):
            self.error(f"{option} must not be empty, got {value!r}")
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.error = self.error
        finder.add_argument("--config")
        recipe = finder.parse_known_args(argv)[0].config
        if recipe is not None:
            self._read_recipe(recipe)
        _, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings if "_" not in option]
            self.error(f"unknown argument {unknown[0]}{suggestion(unknown[0], known)}")
        values = vars(self.parse_args(argv))
        try:
            parsed = [one(**{entry.name: values[entry.name] for entry in fields(one)}) for one in self._dataclass_types]
        except ValueError as error:
            self.error(str(error))
        return (*parsed, *(values[name] for name in self._positional_names))

    def given(self, argv: Sequence[str] | None = None) -> set[str]:
        """Names of the flags that a command line sets, itself or by the recipe, which [`parse`] has read."""
        unset = object()
        start = argparse.Namespace(**{action.dest: unset for action in self._actions})
        typed = vars(self.parse_known_args(sys.argv[1:] if argv is None else argv, start)[0])
        return self._of_recipe | {name for name, value in typed.items() if value is not unset}

    def _empty_values(self, argv: list[str]) -> Iterator[tuple[str, str]]:
        """Flags and positional arguments without text, as of a shell variable that is not set."""
        values = vars(self.parse_known_args(argv)[0])
        for action in self._actions:
            value = values.get(action.dest)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not text.strip():
                    option = next((o for o in action.option_strings if "_" not in o), action.dest.upper())
                    yield option, text

    def _as_switch(self, word: str, next_word: str) -> str:
        """Turns `--flag` into `--flag=true`, so that argparse does not read a positional argument as its value."""
        action = self._option_string_actions.get(word)
        is_switch = action is not None and action.type is to_bool
        return f"{word}=true" if is_switch and next_word.lower() not in ("true", "false") else word

    def _read_recipe(self, path: str) -> None:
        try:
            with open(RECIPES.get(path, path)) as file:
                recipe = yaml.load(file, _RecipeLoader)
        except (OSError, ValueError) as error:
            meant = suggestion(path, RECIPES) if isinstance(error, FileNotFoundError) else ""
            self.error(f"cannot read recipe {path}: {getattr(error, 'strerror', None) or 'not a text file'}{meant}")
        except yaml.YAMLError as error:
            self.error(f"recipe {path} is not valid YAML: {error}")
        except RecursionError:
            self.error(f"recipe {path} is not valid: it is nested too deeply")
        if recipe in NULLS:
            recipe = {}
        if not isinstance(recipe, dict):
            self.error(f"recipe {path} must hold `flag_name: value` lines")
        flags = (a for a in self._positive_actions() if a.option_strings and a.dest not in ("help", "config"))
        actions = {a.dest.rstrip("_"): a for a in flags}
        for key, value in recipe.items():
            if key not in actions:
                self.error(f"unknown key {key!r} in recipe {path}{suggestion(str(key), actions)}")
            self._of_recipe.add(actions[key].dest)
            self.set_defaults(**{actions[key].dest: self._convert(actions[key], value, f"{key} in recipe {path}")})

    def _convert(self, action: argparse.Action, value: Any, name: str) -> Any:
        """Converts and checks a value of the recipe as argparse does on the command line."""
        if value in NULLS:
            if action.default is not None:
                self.error(f"{name} must have a value: leave the line out for the default, {action.default}")
            return None
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) != (action.nargs == "+") or not all(isinstance(item, str) for item in values):
            kind = "a list" if action.nargs == "+" else "a single value"
            shown = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
            self.error(f"{name} must be {kind}, got {shown if len(shown) < 60 else reprlib.repr(value)}")
        try:
            if any(LEADING_ZERO.match(item) for item in values) and action.type in (int, float):
                raise ValueError("YAML and people read such numbers differently")
            converted = [action.type(item) if callable(action.type) else item for item in values]
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            self.error(f"invalid value for {name}: {reprlib.repr(value)}")
        for item in converted:
            if action.choices and item not in action.choices:
                self.error(f"{name} must be one of {', '.join(map(str, action.choices))}, got {reprlib.repr(item)}")
        return converted if isinstance(value, list) else converted[0]


class _RecipeLoader(yaml.BaseLoader):
    """Reads every value as text, which the flags convert, as on the command line; a key that comes twice is an error.

    YAML itself would read `010` as 8 and `1:30` as 90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep=True)
