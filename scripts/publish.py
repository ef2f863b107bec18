"""accelerate launch scripts/publish.py ...: the same as `optvq publish ...`."""

import sys
from pathlib import Path


# Python puts this folder first on its path, where evaluate.py would hide the `evaluate` library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from optvq_hf.commands.publish import main  # noqa: E402


if __name__ == "__main__":
    main()
