"""Measures how many rounds the warm start saves, on the features of a training run.

    python scripts/benchmark_warm_start.py --config scripts/recipes/mnist.yaml

Trains as `optvq train` does, with the recipe's own transport. At some steps the features of the batch are also assigned with
a cold start and with a warm start (the potentials of the previous batch, after 5 rounds per batch), by different numbers of
rounds. Prints the marginal error of every resulting plan as a Markdown table.
"""

import sys
from pathlib import Path


# Python puts this folder first on its path, where evaluate.py would hide the `evaluate` library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402

from optvq_hf.commands.train import make_parser  # noqa: E402
from optvq_hf.model_quantizer_optvq import OptVQModelQuantizer  # noqa: E402
from optvq_hf.sinkhorn import Assignment, sinkhorn_assign  # noqa: E402
from optvq_hf.training.arguments import Recipe  # noqa: E402
from optvq_hf.training.preparation import make_run  # noqa: E402


FLAGS = ["--report-to", "none", "--images-every", "0", "--output-dir", "runs/benchmark_warm_start"]
STEPS = (10, 50, 100, 200, 400, 600, 790)
COLD_ROUNDS, WARM_ROUNDS = (1, 2, 5, 10, 20, 30), (1, 2, 5)
ROUNDS_OF_THE_CHAIN = 5


class Observed(OptVQModelQuantizer):
    """Assigns as its base class does, and measures marginal errors."""

    step = 0
    chain: torch.Tensor | None = None  # potentials of the previous batch
    rows: list[list]

    def _transport(self, features: torch.Tensor, codebook: torch.Tensor, start: torch.Tensor | None) -> Assignment:
        def solve(iterations: int, potentials: torch.Tensor | None) -> Assignment:
            return sinkhorn_assign(
                features,
                codebook,
                epsilon=self.epsilon,
                iterations=iterations,
                normalization=self.normalization,
                balance=self.balance,
                potentials=potentials,
            )

        def error(iterations: int, potentials: torch.Tensor | None) -> float:
            """Marginal error of the plan after so many rounds."""
            return solve(0, solve(iterations, potentials).potentials).marginal_error.item()

        self.step += 1
        if self.step in STEPS:
            cold = [error(rounds, None) for rounds in COLD_ROUNDS]
            self.rows.append([self.step, *cold, *(error(rounds, self.chain) for rounds in WARM_ROUNDS)])
        self.chain = solve(ROUNDS_OF_THE_CHAIN, self.chain).potentials
        return super()._transport(features, codebook, start)


def main():
    *of_run, data, model_arguments = make_parser().parse([*FLAGS, "--eval-split", "test[:64]", *sys.argv[1:]])
    fields = {name: value for name, value in vars(model_arguments).items() if value is not None}
    run, _ = make_run(Recipe(*of_run), data, fields)
    quantizer = run.model.quantizer
    quantizer.__class__, quantizer.rows = Observed, []
    run.train()
    header = ["step", *(f"{rounds} cold" for rounds in COLD_ROUNDS), *(f"{rounds} warm" for rounds in WARM_ROUNDS)]
    print()
    for row in (
        header,
        ["-"] * len(header),
        *([step, *(f"{e:.3f}" for e in errors)] for step, *errors in quantizer.rows),
    ):
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
