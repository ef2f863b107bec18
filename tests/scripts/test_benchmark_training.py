import json
import runpy
from pathlib import Path

from training.runs import flags


def test_shares_of_a_step(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "benchmark_training.py"
    main = runpy.run_path(str(script))["main"]
    report = main(flags(tmp_path, max_steps=10, log_every=2, save_every=0))
    assert report.keys() == {"recorder", "EMA of the weights", "log and tracker", "waiting for data", "step (ms)"}
    assert all(value > 0 for value in report.values())
    assert sum(value for name, value in report.items() if name != "step (ms)") < 100
    assert json.loads((tmp_path / "training_benchmark.json").read_text()) == report
