"""Runs `python -m optvq_hf ...` as `optvq ...`."""

from .commands.cli import main


if __name__ == "__main__":
    main()
