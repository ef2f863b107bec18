import sys
from pathlib import Path

import pytest


SPACE = Path(__file__).resolve().parents[2] / "spaces" / "optvq"


@pytest.fixture
def space(monkeypatch) -> Path:
    """The folder of the demo, from which its modules can be imported."""
    monkeypatch.syspath_prepend(SPACE)
    yield SPACE
    for name in ("app", "picture_codes"):
        sys.modules.pop(name, None)
