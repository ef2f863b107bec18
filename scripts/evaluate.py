"""accelerate launch scripts/evaluate.py ...: the same as `optvq evaluate ...`."""

from optvq_hf.commands.evaluate import main


if __name__ == "__main__":
    main()
