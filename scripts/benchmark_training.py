"""Measures the overhead of a training step: recorder, EMA of the weights, log and tracker, and waiting for data.

    python scripts/benchmark_training.py --config scripts/recipes/mnist.yaml --num-workers 1 --ema-decay 0.999

Takes the flags of `optvq train`. The run's own stopwatch times each part inside the same steps (on CPUs, where a call
returns when its work is done). Prints the median share over blocks of `--log-every` steps. Writes
training_benchmark.json beside the log.
"""

import json
import statistics
import sys
import time
from pathlib import Path


# Appended, because in first position scripts/evaluate.py would hide the library of that name.
sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from optvq_hf.commands.train import make_parser  # noqa: E402
from optvq_hf.training.arguments import Recipe  # noqa: E402
from optvq_hf.training.preparation import make_run  # noqa: E402


PARTS = ("recorder", "EMA of the weights", "log and tracker", "waiting for data")


def main(argv=None) -> dict:
    *of_run, data, model_arguments = make_parser().parse(argv)
    recipe = Recipe(*of_run)
    fields = {name: value for name, value in vars(model_arguments).items() if value is not None}
    run, _ = make_run(recipe, data, fields)
    readings = []  # the clock and what the run's stopwatch shows, after every block of steps
    batches, log_every = run.batches, recipe.record.log_every

    def read_between_blocks():
        for number, batch in enumerate(batches):
            if number % (log_every * recipe.training.gradient_accumulation_steps) == 0:
                readings.append((time.perf_counter(), dict(run.stopwatch.seconds)))
            yield batch

    run.batches = read_between_blocks()
    run.train()
    blocks = []
    for (before, seconds_before), (after, seconds) in zip(
        readings[2:], readings[3:]
    ):  # the first set up memory and workers
        spent = {name: seconds.get(name, 0.0) - seconds_before.get(name, 0.0) for name in PARTS}
        blocks.append({name: 100 * part / (after - before) for name, part in spent.items()})
        blocks[-1]["step (ms)"] = 1e3 * (after - before) / log_every
    if not blocks:
        raise ValueError(f"too few steps: four blocks of --log-every {log_every} are needed")
    report = {name: statistics.median(block[name] for block in blocks) for name in blocks[0]}
    for name, value in report.items():
        print(f"{name:20} {value:8.2f}{'' if '(' in name else ' %'}")
    (run.output_dir / "training_benchmark.json").write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
