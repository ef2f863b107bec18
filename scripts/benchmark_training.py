"""What a training step spends on being watched: recorder, averaged weights, log and tracker, and waiting for data.

    python scripts/benchmark_training.py --config scripts/recipes/mnist.yaml --num-workers 1 --ema-decay 0.999

Takes the flags of `optvq train`. Each part is timed inside the same steps (on CPUs, where a call returns when its work is
done); shares are of blocks of `--log-every` steps, and their median is shown. Writes training_benchmark.json beside the log.
"""

import json
import statistics
import sys
import time
from pathlib import Path


# Appended, not put first: scripts/evaluate.py would hide the library of that name.
sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from accelerate.utils import set_seed  # noqa: E402

from optvq_hf.commands.models import make_model  # noqa: E402
from optvq_hf.commands.train import make_parser  # noqa: E402
from optvq_hf.data.batches import training_batches  # noqa: E402
from optvq_hf.training.arguments import Recipe  # noqa: E402
from optvq_hf.training.history import History  # noqa: E402
from optvq_hf.training.loop import Run  # noqa: E402
from optvq_hf.training.trackers import make_accelerator  # noqa: E402


class Stopwatch:
    """Adds up the time of calls, by name."""

    def __init__(self):
        self.seconds = {}

    def watch(self, holder, method: str, name: str):
        inner = getattr(holder, method)

        def timed(*arguments, **keywords):
            before = time.perf_counter()
            result = inner(*arguments, **keywords)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - before
            return result

        setattr(holder, method, timed)


def main(argv=None) -> dict:
    *of_run, data, model_arguments = make_parser().parse(argv)
    recipe = Recipe(*of_run)
    accelerator = make_accelerator(recipe)
    set_seed(recipe.training.seed)
    fields = {name: value for name, value in vars(model_arguments).items() if value is not None}
    model, image_processor = make_model(fields)
    batches = training_batches(data, image_processor, recipe.training.batch_size, recipe.training.seed)
    run = Run(model, image_processor, batches, recipe.training.max_steps, recipe, accelerator)

    watch, blocks = Stopwatch(), []
    watch.watch(run.recorder, "count", "recorder")
    watch.watch(run.recorder, "entry", "recorder")
    watch.watch(accelerator, "log", "log and tracker")
    watch.watch(History, "add", "log and tracker")
    watch.watch(run, "_next_batches", "waiting for data")
    if run.networks.averaged is not None:
        watch.watch(run.networks.averaged, "update_parameters", "averaged weights")
    log, since = run._log, time.perf_counter()

    def log_and_note(result, progress):
        nonlocal since
        log(result, progress)
        now = time.perf_counter()
        blocks.append({name: 100 * seconds / (now - since) for name, seconds in watch.seconds.items()})
        blocks[-1]["step (ms)"] = 1e3 * (now - since) / recipe.record.log_every
        watch.seconds.clear()
        since = now

    run._log = log_and_note
    run.train()
    blocks = blocks[2:]  # the first steps set up memory and workers
    report = {name: statistics.median(block.get(name, 0.0) for block in blocks) for name in blocks[0]}
    for name, value in report.items():
        print(f"{name:20} {value:8.2f}{'' if '(' in name else ' %'}")
    (Path(recipe.training.output_dir) / "training_benchmark.json").write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
