"""Comparisons in folders: what is run, what is refused, and the report."""

import json
import math

import pytest
from matplotlib.figure import Figure

from optvq_hf.commands import compare
from optvq_hf.data.arguments import DataArguments
from optvq_hf.data.batches import evaluation_batches
from optvq_hf.evaluation import arguments, comparison_report, studies
from optvq_hf.evaluation.comparison import run, split_images
from optvq_hf.evaluation.image_digest import image_digests, images_sha256
from optvq_hf.evaluation.studies import Comparison
from optvq_hf.image_processing_optvq import OptVQImageProcessor


def result(rival, rate, seed, validation, test):
    scores = {"psnr": 20.0, "ssim": 0.5, "codebook_usage": 99.0, "perplexity": 50.0}
    held_out = {"mse": validation, "codebook_usage": 100.0}
    parts = {"validation": held_out, "test": {"mse": test, **scores}, "train": {"mse": 0.01}}
    return {"rival": rival, "learning_rate": rate, "seed": seed, "seconds": 1.0, "device": "CPU", **parts}


def test_no_two_curves_look_alike(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    rows = [{"rival": f"r{number}", "title": f"{number}", "mse_of_rates": {"0.01": [0.1]}} for number in range(30)]
    comparison_report.draw_rates(rows, tmp_path / "rates.png")
    [axes] = drawn[0].axes
    curves = [line for line in axes.lines if len(line.get_xdata())]
    assert len({(line.get_color(), line.get_marker()) for line in curves}) == len(curves) == len(rows)


def test_the_best_rate_is_chosen_on_held_out_images():
    runs = [
        *(result("ema", 1e-3, seed, 0.3, 0.1) for seed in (0, 1)),  # best on the test images
        *(result("ema", 1e-2, seed, 0.2, test) for seed, test in ((0, 0.4), (1, 0.6), (2, 0.5))),
        *(result("ema", 1e-1, seed, error, error) for seed, error in ((0, 0.1), (1, None))),  # diverges
        result("fsq", 1e-3, 0, None, None),
    ]
    assert comparison_report.best_rates(runs) == {"ema": 1e-2}
    runs.append(result("ema", 1e-2, 3, None, None))
    assert comparison_report.best_rates(runs) == {"ema": 1e-3}  # where fewer diverge
    runs.append(result("ema", 1e-3, 3, None, None))
    assert comparison_report.best_rates(runs) == {"ema": 1e-2}
    for run_of in runs[-2:]:  # a seed that diverges is not in the mean, and is told
        run_of["train"]["mse"] = None
    ema, fsq, simvq = comparison_report.summarise(runs, ["ema", "fsq", "simvq"], 1024)
    assert ema["seeds"] == [0, 1, 2] and ema["diverged_seeds"] == [3]
    assert ema["mse"] == pytest.approx(0.5) and ema["mse_of_seeds"] == [0.4, 0.6, 0.5]
    assert ema["mse_standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    shown = comparison_report.tables([ema, fsq, simvq])
    assert "| EMA codes, k-means start, restart | 10.00 | 0.01 | 0.5000 (3 of 4) | 0.0577 |" in shown
    assert "| 99.0 | 50 | 0.2000 | 100.0 | 0.0100 | 4 |" in shown
    # Cells of the search have its seeds alone, those that all rates have.
    assert "| EMA codes, k-means start, restart | 0.1000 | 0.5000 | 0.1000 (1 of 2) |" in shown
    assert "| FSQ | 9.97 | - | diverged | - |" in shown and "| FSQ | diverged | not run | not run |" in shown
    assert "| SimVQ | 10.00 | - | not run | - |" in shown and "| SimVQ | not run | not run | not run |" in shown


def test_further_seeds_may_change_the_best_rate(tmp_path, monkeypatch):
    """A rate that was the best of the search by luck: the next best gets further seeds, and the figure."""
    comparison = compared(tmp_path, rivals=["ema"], learning_rates=[1e-3, 1e-2, 1e-1], confirm_seeds=[1, 2])
    errors = {1e-1: {0: 0.1, 1: 0.9, 2: 0.9}, 1e-2: {0: 0.2, 1: 0.2, 2: 0.3}, 1e-3: {0: 0.3}}
    done, order = [], []

    def run_all(missing, parallel):
        order.append([(settings.learning_rate, settings.seed) for _, settings in missing])
        for folder, settings in missing:
            if (settings.learning_rate, settings.seed) != (1e-2, 2):  # this one fails: it is tried once, not for ever
                error = errors[settings.learning_rate][settings.seed]
                done.append(result("ema", settings.learning_rate, settings.seed, error, error))
                (folder / "runs").mkdir(exist_ok=True)
                (folder / "runs" / f"{settings.name}.json").touch()
        return []

    monkeypatch.setattr(studies, "_run_all", run_all)
    monkeypatch.setattr(Comparison, "prepare", lambda self: None)
    monkeypatch.setattr(Comparison, "_runs", lambda self: done)
    monkeypatch.setattr(Comparison, "report", lambda self: "")
    studies.run_comparisons([comparison], 1, lambda text: None)
    assert order == [[(1e-3, 0), (1e-2, 0), (1e-1, 0)], [(1e-1, 1), (1e-1, 2)], [(1e-2, 1), (1e-2, 2)]]
    assert comparison_report.best_rates(done) == {"ema": 1e-2}


def test_a_run_that_is_missing_hides_no_rate():
    """A run of the search failed: cells of the search are of the seeds that all rates have."""
    runs = [result("ema", rate, seed, error, error) for rate, error in ((1e-3, 0.3), (1e-2, 0.2)) for seed in (0, 1)]
    assert comparison_report.best_rates(runs[:-1]) == {"ema": 1e-2}
    [row] = comparison_report.summarise(runs[:-1], ["ema"], 64)
    assert row["mse_of_rates"] == {"0.001": [0.3], "0.01": [0.2]}


def test_figures_that_were_not_measured():
    runs = [result("residual", 1e-2, seed, 0.2, 0.2) for seed in (0, 1)]
    runs[0]["test"]["codebook_usage"] = None
    [row] = comparison_report.summarise(runs, ["residual"], 1024)
    assert row["codebook_usage"] is None and row["perplexity"] == 50
    assert "| 20.00 | 0.500 | - | 50 |" in comparison_report.tables([row])


def test_versions_that_differ():
    runs = [{"versions": {"torch": "2.0"}}, {"versions": {"torch": "2.1", "vector-quantize-pytorch": "1.32"}}]
    assert comparison_report.different_versions(runs) == "Runs had different versions: torch 2.0, 2.1."
    assert comparison_report.different_versions(runs[:1]) == ""


def compared(folder, dataset="fashion_mnist_sample", **flags):
    """A comparison of one step, in this process."""
    flags = {"rivals": ["fsq"], "learning_rates": [1e-3], "max_steps": 1, "max_images": 20, **flags}
    flags = {"batch_size": 4, "image_size": 8, "num_channels": 1, "codebook_size": 16, "codebook_dim": 2, **flags}
    split = {"train_split": "test[:20]", "eval_split": "test[:1]"}
    return Comparison(
        arguments.ComparisonArguments(output_dir=str(folder), **flags), DataArguments(dataset=dataset, **split)
    )


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs one after another, without a pool."""

    def run_all(missing, parallel):
        failed = []
        for folder, of_run in missing:
            try:
                studies._run(folder, of_run)
            except Exception as error:
                failed.append(error)
        return failed

    monkeypatch.setattr(studies, "_run_all", run_all)


def test_a_folder_holds_runs_of_the_same_images(tmp_path, in_this_process):
    shown = []
    studies.run_comparisons([compared(tmp_path)], 1, shown.append)
    noted = json.loads((tmp_path / "comparison.json").read_text())
    assert set(noted["images_sha256"]) == {"train", "validation", "test"} == set(noted["images"])
    assert noted["unreadable"] == {"training images": 0, "test images": 0}
    of_run = json.loads((tmp_path / "runs" / "fsq-lr0.001-seed0.json").read_text())
    assert of_run["images_sha256"] == noted["images_sha256"] and "| FSQ |" in shown[0]
    data = DataArguments(dataset="fashion_mnist_sample", eval_split="test[:1]")
    processor = OptVQImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, num_channels=1)
    [batch] = evaluation_batches(data, processor, 1)
    assert noted["images_sha256"]["test"] == images_sha256(image_digests(batch))  # as evaluation has it
    # Another rival joins: the report is of both.
    studies.run_comparisons([compared(tmp_path, rivals=["lfq"])], 1, shown.append)
    assert "| LFQ |" in shown[1] and "| FSQ |" in shown[1]
    # The images are read again, and the dataset has others by now.
    images_file = tmp_path / "images.safetensors"
    kept = images_file.read_bytes()
    images_file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "split_images", lambda train, test, first: split_images(train, 255 - test, first))
        with pytest.raises(ValueError, match="holds a comparison of other images than those of --dataset fashion"):
            compared(tmp_path).prepare()
    assert not images_file.exists()
    compared(tmp_path).prepare()
    assert images_file.read_bytes() == kept
    (tmp_path / "runs" / "ema.json").write_text(json.dumps({**of_run, "images_sha256": {}}))
    with pytest.raises(ValueError, match="ema.json is of another comparison, by its images_sha256: remove it"):
        compared(tmp_path).prepare()
    (tmp_path / "runs" / "ema.json").write_text(json.dumps({**of_run, "max_steps": 5}))
    with pytest.raises(ValueError, match="ema.json is of another comparison, by its max_steps: remove it"):
        compared(tmp_path).prepare()
    (tmp_path / "runs" / "ema.json").write_text("{")
    with pytest.raises(ValueError, match="ema.json is a broken result, remove it"):
        compared(tmp_path).prepare()


def test_a_dataset_that_is_not_there_leaves_the_folder_free(tmp_path):
    with pytest.raises((ValueError, OSError)):
        compared(tmp_path, dataset=str(tmp_path / "typo")).prepare()
    compared(tmp_path).prepare()


def test_a_run_that_fails_leaves_a_report(tmp_path, in_this_process, monkeypatch):
    def fail_once(of_run, images):
        if of_run.rival == "lfq":
            raise KeyError("lost")
        return run(of_run, images)

    monkeypatch.setattr(studies, "run", fail_once)
    shown = []
    with pytest.raises(ValueError, match="1 runs failed, the first by lfq-lr0.001-seed0: 'lost'"):
        studies.run_comparisons([compared(tmp_path, rivals=["fsq", "lfq"], confirm_seeds=[1])], 1, shown.append)
    assert (tmp_path / "runs" / "fsq-lr0.001-seed1.json").is_file()
    assert "| LFQ | 4.00 | - | not run |" in shown[0]


def test_a_comparison_in_which_all_diverge(tmp_path):
    compared(tmp_path).prepare()
    noted = json.loads((tmp_path / "comparison.json").read_text())
    runs = [{**result("fsq", 1e-3, 0, None, None), "curve": [], "num_parameters": 1, "versions": {}, "diverged_at": 1}]
    assert "| FSQ | diverged |" in comparison_report.write_comparison(tmp_path, runs, ["fsq"], noted)
    assert {"results.json", "rates.png", "reconstructions.png"} < {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("flags", ({"random_flip": True}, {"eval_fraction": 0.1}, {"eval_fraction_seed": 1}))
def test_flags_without_effect_are_refused(flags, tmp_path):
    with pytest.raises(ValueError, match="has no effect on a comparison, leave it out"):
        Comparison(arguments.ComparisonArguments(output_dir=str(tmp_path)), DataArguments(dataset="x", **flags))


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    """Started again, it runs only what is missing, and with the same result."""
    words = ["--dataset", "fashion_mnist_sample", "--num-channels", "1", "--image-size", "16", "--codebook-size", "64"]
    words += ["--max-steps", "6", "--max-images", "300", "--rivals", "transport", "ema", "--output-dir", str(tmp_path)]
    words += ["--learning-rates", "1e-3", "1e-2", "--confirm-seeds", "1"]
    compare.main(words)
    assert "| transport, as in the paper |" in capsys.readouterr().out
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    assert len(runs) == 2 * 2 + 2
    removed = tmp_path / "runs" / "ema-lr0.01-seed0.json"
    before = json.loads(removed.read_text())
    removed.unlink()
    compare.main(words)
    after = json.loads(removed.read_text())
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    assert {path for path in runs if runs[path] != again[path]} == {removed}
    assert {"results.md", "rates.png", "reconstructions.png"} < {path.name for path in tmp_path.iterdir()}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["dataset"] == "fashion_mnist_sample" and set(results["settings"]["images"]) == {
        "train",
        "validation",
        "test",
    }
    assert len(results["runs"]) == 6 and [row["rival"] for row in results["rows"]] == ["transport", "ema"]
    assert comparison_report.summarise(results["runs"], ["transport", "ema"], 64) == results["rows"]
    with pytest.raises(SystemExit, match="1"):
        compare.main([*words, "--max-steps", "7"])
    assert "holds a comparison with --max-steps 6, not 7" in capsys.readouterr().err
