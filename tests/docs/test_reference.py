"""docs/reference.md: a row for every known quirk of the original, and a test that exists for every row."""

import re
from pathlib import Path


TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "reference.md").read_text()
ROWS = re.findall(r"^\| (\d+)\. .*\| (?:same|better|option) \| (`.*`) \|$", PAGE, re.MULTILINE)


def test_every_quirk_has_a_row():
    assert [int(number) for number, *_ in ROWS] == list(range(1, 36))


def test_every_row_has_a_test():
    for number, tests in ROWS:
        named = re.findall(r"`([\w/.]+)::(\w+)`", tests)
        assert len(named) == tests.count("`") / 2 > 0
        for file, test in named:
            assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.MULTILINE), (
                f"row {number}: {file}::{test}"
            )
