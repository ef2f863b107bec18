"""accelerate launch scripts/train.py ...: the same as `optvq train ...`."""

from optvq_hf.commands.train import main


if __name__ == "__main__":
    main()
