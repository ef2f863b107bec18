"""How many rounds the warm start saves, on the features of a real training run.

    python scripts/benchmark_warm_start.py --config scripts/recipes/mnist.yaml

Trains as `optvq train` does, with the recipe's own transport. At some steps the features of the batch are also assigned from
nothing ("cold") and from the potentials of the batch before ("warm", a chain of 5 rounds a step that runs along), by different
numbers of rounds. Prints the marginal error of every resulting plan as a markdown table.
"""

import sys
from pathlib import Path


# Python puts this folder first on its path, where evaluate.py would hide the `evaluate` library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from optvq_hf import quantizer_optvq  # noqa: E402
from optvq_hf.commands.train import main as train  # noqa: E402
from optvq_hf.sinkhorn import sinkhorn_assign  # noqa: E402


STEPS = (10, 50, 100, 200, 400, 600, 790)
COLD_ROUNDS, WARM_ROUNDS = (1, 2, 5, 10, 20, 30), (1, 2, 5)
ROUNDS_OF_THE_CHAIN = 5


class Observer:
    """Stands in for `sinkhorn_assign` in the quantizer, and does the same."""

    def __init__(self):
        self.step, self.potentials, self.rows = 0, None, []

    def __call__(self, features, codebook, **settings):
        def solve(iterations, potentials):
            return sinkhorn_assign(
                features, codebook, **{**settings, "iterations": iterations, "potentials": potentials}
            )

        def error(iterations, potentials):
            """Of the plan after so many rounds: what one more update would see."""
            return solve(0, solve(iterations, potentials).potentials).marginal_error.item()

        self.step += 1
        if self.step in STEPS:
            cold = [error(rounds, None) for rounds in COLD_ROUNDS]
            self.rows.append([self.step, *cold, *(error(rounds, self.potentials) for rounds in WARM_ROUNDS)])
        self.potentials = solve(ROUNDS_OF_THE_CHAIN, self.potentials).potentials
        return sinkhorn_assign(features, codebook, **settings)


def main():
    observer = quantizer_optvq.sinkhorn_assign = Observer()
    flags = ["--report-to", "none", "--images-every", "0", "--output-dir", "runs/benchmark_warm_start"]
    train([*flags, "--eval-split", "test[:64]", *sys.argv[1:]])
    header = ["step", *(f"{rounds} cold" for rounds in COLD_ROUNDS), *(f"{rounds} warm" for rounds in WARM_ROUNDS)]
    print()
    for row in (
        header,
        ["-"] * len(header),
        *([step, *(f"{e:.3f}" for e in errors)] for step, *errors in observer.rows),
    ):
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
