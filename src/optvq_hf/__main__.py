"""`python -m optvq_hf ...`: the same as `optvq ...`."""

from .commands.cli import main


if __name__ == "__main__":
    main()
