"""What the solver's small functions gain over their one-line torch forms, side by side in one run.

    python scripts/benchmark_row_functions.py

Ratios of medians, at a block of 8 MB (2,048 rows of 1,024 codes, and 128 of 16,384). A function that gains nothing should go.
"""

import argparse
import statistics
import time

import torch

from optvq_hf.distances import KeptMatrix
from optvq_hf.nearest import top_two
from optvq_hf.sinkhorn_rows import block_moments, exponentiate_, weighted_column_sums


def kept_and_written(shape: tuple[int, int]):
    memory = KeptMatrix(shape, torch.empty(0))
    memory.matrix.zero_()
    memory.release()


def variants(num_rows: int, num_codes: int) -> dict[str, tuple]:
    """By name of the function: it, and its torch form."""
    generator = torch.Generator().manual_seed(0)
    block = torch.rand(num_rows, num_codes, generator=generator)
    offsets, weights = torch.rand(2, num_rows, generator=generator)
    scale, scratch, large = torch.tensor(10.0), torch.empty_like(block), (8 * num_rows, num_codes)
    return {
        "exponentiate_": (
            lambda: exponentiate_(scratch.copy_(block), scale, offsets),
            lambda: scratch.copy_(block).sub_(offsets[:, None]).mul_(-scale).exp_(),
        ),
        "weighted_column_sums": (lambda: weighted_column_sums(block, weights), lambda: weights @ block),
        "block_moments": (lambda: block_moments(block, scratch), lambda: torch.var_mean(block)),
        "top_two": (lambda: top_two(block), lambda: block.topk(2, dim=1)),
        "KeptMatrix (64 MB)": (lambda: kept_and_written(large), lambda: torch.empty(large).zero_()),
    }


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=30)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = []
    print("| function | rows | codes | its time | torch form | gain |\n| - | - | - | - | - | - |")
    for num_rows, num_codes in ((2048, 1024), (128, 16384)):
        for name, pair in variants(num_rows, num_codes).items():
            seconds = [[], []]
            for _ in range(arguments.turns + 2):
                for function, times in zip(pair, seconds):
                    start = time.perf_counter()
                    function()
                    times.append(time.perf_counter() - start)
            ours, theirs = (statistics.median(times[2:]) for times in seconds)
            rows.append({"function": name, "rows": num_rows, "codes": num_codes, "gain": theirs / ours})
            print(
                f"| `{name}` | {num_rows} | {num_codes} | {1e3 * ours:.2f} ms | {1e3 * theirs:.2f} ms | {theirs / ours:.1f} x |"
            )
    return rows


if __name__ == "__main__":
    main()
