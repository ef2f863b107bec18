"""What the project's own files promise each other."""

import re
from configparser import ConfigParser
from pathlib import Path

import yaml


REPOSITORY = Path(__file__).parents[1]


def setup() -> ConfigParser:
    config = ConfigParser(interpolation=None)
    config.read(REPOSITORY / "setup.cfg")
    return config


def requirements() -> dict[str, str]:
    """Operator and version of everything in setup.cfg, by name."""
    config = setup()
    lines = config["options"]["install_requires"].split()
    lines += [line for extra in config["options.extras_require"].values() for line in extra.split()]
    found = (re.fullmatch(r"([\w-]+)([>=]=.+)", line) for line in lines if "%" not in line)
    return {match[1]: match[2] for match in found}


def test_the_lowest_versions_are_those_of_setup_cfg():
    lines = (REPOSITORY / "constraints-lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = {name: rest.removeprefix(">=") for name, rest in requirements().items() if rest.startswith(">=")}
    assert pinned.keys() == bounds.keys()
    for name, bound in bounds.items():  # 5.2 is 5.2.0
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pinned[name]), (name, bound, pinned[name])


def test_hooks_have_the_versions_of_the_extra_dev():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = {pin for hook in hooks for pin in hook["additional_dependencies"]}
    have = {f"{name}{rest}" for name, rest in requirements().items()}
    assert pins and pins <= have


def test_python_versions_are_the_same_everywhere():
    of_setup = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", setup()["metadata"]["classifiers"], re.M)
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == of_setup
    assert setup()["options"]["python_requires"] == f">={of_setup[0]}"
    assert f'pythonVersion = "{of_setup[0]}"' in (REPOSITORY / "pyproject.toml").read_text()


def test_ci_runs_every_check():
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    runs = {step.get("run") for job in workflow["jobs"].values() for step in job["steps"]}
    assert runs >= {"make test-slow", "make test-long", "make test-demo", "make docs", "make dist"}


def test_the_citation_and_the_templates_are_valid_yaml():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and "2412.15195" in citation["preferred-citation"]["url"]
    for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        yaml.safe_load(path.read_text())


def test_the_newest_version_of_the_changelog_has_its_sections():
    newest = (REPOSITORY / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert re.findall(r"^### (\w+)$", newest, re.M) == ["Added", "Changed", "Fixed", "Removed"]
