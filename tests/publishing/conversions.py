"""What is asked of conversions that are refused."""

import os
import re

import pytest

from optvq_hf.commands.cli import main


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def fails(capsys, tmp_path, argv, message, code=1):
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *map(str, argv)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == code and len(lines) == 1, lines
    assert lines[0].startswith("optvq convert: error: ") and re.search(message, lines[0]), lines[0]
    assert set(tmp_path.rglob("*")) == before, "something was written"
