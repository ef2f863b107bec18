import json
import runpy
from pathlib import Path


def test_all_ways_are_measured(trained_folder, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "benchmark_tokenize.py"
    flags = ["--model", str(trained_folder), "--dataset", "fashion_mnist_sample", "--max-images", "40"]
    report = runpy.run_path(str(script))["main"]([*flags, "--output-dir", str(tmp_path)], rounds=1)
    assert all(value > 0 for value in report["images per second"].values()) and len(report["images per second"]) == 4
    assert report["seconds in one process"].keys() == {"read", "decode, resize, crop", "encode", "write"}
    assert json.loads((tmp_path / "tokenization_benchmark.json").read_text()) == report
