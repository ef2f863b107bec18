"""Makes the dataset that ships inside the package: the first images of Fashion-MNIST, 400 + 100 of each class.

python scripts/make_fashion_mnist_sample.py --source zalando-datasets/fashion_mnist
"""

import argparse
from collections import Counter
from pathlib import Path

from datasets import load_dataset


PER_CLASS = {"train": 400, "test": 100}
FOLDER = Path(__file__).parents[1] / "src" / "optvq_hf" / "data" / "fashion_mnist_sample"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="zalando-datasets/fashion_mnist", help="Hub id or local folder")
    source = parser.parse_args().source
    for split, wanted in PER_CLASS.items():
        dataset = load_dataset(source, split=split)
        seen, rows = Counter(), []
        for row, label in enumerate(dataset["label"]):
            seen[label] += 1
            if seen[label] <= wanted:
                rows.append(row)
        dataset.select(rows).to_parquet(FOLDER / f"{split}.parquet")
        print(f"{split}: {len(rows)} images, {(FOLDER / f'{split}.parquet').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
