"""Errors of a command as one clear line instead of a stack trace."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .terminal import end_without_reader, print_error


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Ends a failed run with exit code 1 and one line. OPTVQ_TRACEBACK=1 shows where the error came from."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"optvq {command}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        end_without_reader()
    except (ValueError, OSError, ImportError, StrictDataclassError, SafetensorError) as error:
        if os.environ.get("OPTVQ_TRACEBACK") == "1":
            raise
        print_error(f"optvq {command}", one_line(error))
        sys.exit(1)


def one_line(error: Exception) -> str:
    """The message of an error in one line. Data workers and configurations have it in the last line of a report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "DataLoader worker" in lines[0] or isinstance(error, StrictDataclassError):
        name, separator, message = lines[-1].partition(": ")
        message = message if separator and name.split(".")[-1].endswith("Error") else lines[-1]
        field = re.match(r"Validation error for field '(\w+)'", lines[0])
        return f"{field[1]} {message}" if field and message.startswith("must ") else message
    return " ".join(lines)
