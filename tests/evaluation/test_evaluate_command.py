"""`optvq evaluate` of several models, by the original's protocol, and its tables."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchmetrics.functional.image.lpips import _LPIPS

from builders import make_untrained, vqgan_config
from optvq_hf.commands.evaluate import by_model, main, make_parser
from optvq_hf.evaluation import evaluator
from optvq_hf.evaluation.arguments import EvaluationArguments
from optvq_hf.evaluation.protocols import METRICS, PROTOCOLS, check_metrics
from optvq_hf.evaluation.results import check_loses_nothing
from optvq_hf.evaluation.tables import STYLES, Row, format_table
from optvq_hf.publishing.entries import known_entries
from optvq_hf.training.losses import perceptual
from optvq_hf.training.models import make_image_processor


DATA = ["--dataset", "fashion_mnist_sample", "--max-images", "40"]


def evaluate(*words):
    main([*map(str, words), *DATA])


def fails(capsys, *words) -> str:
    with pytest.raises(SystemExit):
        evaluate(*words)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def networks(monkeypatch, small_network):
    """The networks of the original's protocol with random weights: theirs are downloads."""
    torch.manual_seed(0)
    lpips = _LPIPS(net="alex", pnet_rand=True, pretrained=False)
    monkeypatch.setattr(perceptual, "_download", lambda name: lpips)
    monkeypatch.setattr(evaluator, "load_network", lambda name, device: small_network)


def test_several_models(trained_folder, tmp_path, capsys):
    other = shutil.copytree(trained_folder, tmp_path / "other")
    evaluate("--model", trained_folder, other, "--output-dir", tmp_path / "out", "--table", "markdown")
    shown = capsys.readouterr().out
    reports = [read(tmp_path / "out" / name) for name in (trained_folder.name, "other")]
    assert reports[0]["mse"] == reports[1]["mse"] and reports[0]["weights_sha256"] == reports[1]["weights_sha256"]
    assert reports[0]["images_sha256"] == reports[1]["images_sha256"]
    assert reports[0]["settings_sha256"] == reports[1]["settings_sha256"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in shown and table.count("\n") == 4
    assert "| other | nearest |" in table and "usage % per head" in table
    assert {path.name for path in (tmp_path / "out").glob("table.*")} == {"table.txt", "table.md", "table.tex"}


def test_images_in_tiles(trained_folder, tmp_path, capsys):
    whole, tiled = tmp_path / "whole", tmp_path / "tiled"
    evaluate("--model", trained_folder, "--output-dir", whole)
    evaluate("--model", trained_folder, "--output-dir", tiled, "--tile-size", "16")
    assert "tile_size" not in read(whole) and read(tiled)["tile_size"] == 16
    assert read(tiled)["mse"] == pytest.approx(read(whole)["mse"], rel=1e-5)
    assert read(tiled)["images_sha256"] == read(whole)["images_sha256"]
    assert known_entries("metrics.json", read(tiled)) == read(tiled)
    message = fails(capsys, "--model", trained_folder, "--output-dir", tmp_path / "none", "--tile-size", "2")
    assert "tile_size must be an integer number of pixels, at least the downsampling factor 4, got 2" in message


def test_what_the_model_refuses_is_known_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "evaluate_model", None)
    config = vqgan_config(num_channels=1)
    make_untrained(config).save_pretrained(tmp_path)
    processor = make_image_processor(config)
    processor.save_pretrained(tmp_path)
    words = ["--model", tmp_path, "--output-dir", tmp_path / "out"]
    assert "blended: tile_size must be at least 8" in fails(capsys, *words, "--tile-size", "6")
    processor.pad_to_multiple_of = 2
    processor.save_pretrained(tmp_path)
    assert "the image processor pads pictures (pad_to_multiple_of=2), which is for" in fails(capsys, *words)


def test_models_of_one_name_have_folders_of_their_own(trained_folder, tmp_path, monkeypatch):
    for name in ("a", "b"):
        shutil.copytree(trained_folder, tmp_path / name / "run")
    monkeypatch.chdir(tmp_path)
    evaluate("--model", "a/run", "b/run", "--output-dir", "out")
    assert sorted(path.parent.name for path in tmp_path.glob("out/*/metrics.json")) == ["a--run", "b--run"]


@pytest.mark.parametrize(
    ("models", "folders"),
    [
        (["../a", "a", "./a"], ["a", "a-2", "a-3"]),
        (["owner/a", "owner--a", "OWNER/a"], ["owner--a", "owner--a-2", "OWNER--a-3"]),
        (["../x/.", "x"], ["x", "x-2"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_no_two_models_have_one_folder(models, folders, tmp_path, monkeypatch):
    for name in ("a", "b", "x", "here/a", "here/x"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    alone = by_model(EvaluationArguments(model=models, output_dir="out"))
    assert [of_model.model for of_model in alone.values()] == [[model] for model in models]
    assert [of_model.output_dir for of_model in alone.values()] == [f"out/{folder}" for folder in folders]


def test_models_that_would_write_to_one_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for models in (["runs/a--b", "a/b"], ["runs/a--b", "./runs/a--b"]):
        (tmp_path / "runs" / "a--b").mkdir(parents=True, exist_ok=True)
        with pytest.raises(
            ValueError, match=rf"{models[0]} and {models[1]} would lie in one folder, .*: pass --output"
        ):
            by_model(EvaluationArguments(model=models))


def other_processor(folder, **settings):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "good", "missing"], "missing"),
        (["--model", "good", "better"], "better/metrics.json has 10,000 images"),
        (["--model", "good", "--max-images", "1", "--metrics", "fid"], "a Frechet distance needs at least 2 images, got 1"),
        (["--model", "good", "small", "--metrics", "lpips_alex"], "lpips_alex needs images with sides of 31 pixels or more"),
    ],
)  # fmt: skip
def test_all_is_checked_before_the_first_model_is_evaluated(
    words, message, trained_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluator, "evaluate_model", None)  # no work is begun
    for name in ("good", "better", "small"):
        shutil.copytree(trained_folder, tmp_path / name, ignore=shutil.ignore_patterns("metrics.json"))
    other_processor(tmp_path / "small", crop_size={"height": 28, "width": 28})
    other = {"dataset": "fashion_mnist_sample", "split": "test", "num_images": 10_000, "by_assignment": {"nearest": {}}}
    (tmp_path / "better" / "metrics.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit):
        main([*DATA, *words])
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_digests_tell_what_differs(trained_folder, tmp_path):
    evaluate("--model", trained_folder, "--output-dir", tmp_path / "a")
    evaluate("--model", trained_folder, "--output-dir", tmp_path / "b", "--batch-size", "7")
    evaluate("--model", trained_folder, "--output-dir", tmp_path / "c", "--eval-split", "train")
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert a["images_sha256"] == b["images_sha256"] != c["images_sha256"]
    assert a["settings_sha256"] == c["settings_sha256"] != b["settings_sha256"]
    assert a["weights_sha256"] == b["weights_sha256"] == c["weights_sha256"]


def test_the_protocol_of_the_original(trained_folder, tmp_path, networks, capsys):
    evaluate("--model", trained_folder, "--output-dir", tmp_path, "--protocol", "optvq")
    report = read(tmp_path)
    assert report["assignment"] == "sinkhorn" and report["protocol"] == "optvq"
    assert {"mse", "psnr", "ssim", "psnr_luma", "ssim_luma", "lpips_alex", "fid"} == report["conventions"].keys()
    assert report["fid"] > 0 and report["intervals"].keys() == report["conventions"].keys() - {"fid"}
    head = capsys.readouterr().out.partition("assignment |")[2].splitlines()[0]
    assert [cell.strip() for cell in head.split("|")][:5] == [
        "PSNR luma dB",
        "SSIM luma",
        "LPIPS alex",
        "FID",
        "usage %",
    ]


def test_a_result_with_fewer_metrics_does_not_replace_a_fuller_one(trained_folder, tmp_path, networks, capsys):
    words = ("--model", trained_folder, "--output-dir", tmp_path)
    evaluate(*words, "--metrics", "psnr_luma", "fid")
    before = (tmp_path / "metrics.json").read_bytes()
    line = fails(capsys, *words)
    assert "metrics.json has fid, psnr_luma, which the new result would lack: add it to --metrics" in line
    assert (tmp_path / "metrics.json").read_bytes() == before
    evaluate(*words, "--metrics", "psnr_luma", "fid", "lpips_vgg")
    assert read(tmp_path)["lpips_vgg"] > 0
    evaluate(*words, "--overwrite")
    assert "fid" not in read(tmp_path)


def test_a_result_of_other_images_does_not_replace_one(trained_folder, tmp_path, capsys):
    """Under the same name, and as many: the pixels tell."""
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.effect_noise((32, 32), 10 + 4 * number).save(tmp_path / "images" / f"{number}.png")
    words = ["--model", str(trained_folder), "--dataset", str(tmp_path / "images"), "--eval-split", "train"]
    main([*words, "--output-dir", str(tmp_path / "out")])
    before = (tmp_path / "out" / "metrics.json").read_bytes()
    Image.effect_noise((32, 32), 100).save(tmp_path / "images" / "3.png")
    with pytest.raises(SystemExit):
        main([*words, "--output-dir", str(tmp_path / "out")])
    assert "metrics.json is of 6 other images than these (images_sha256 differs): pass" in capsys.readouterr().err
    assert (tmp_path / "out" / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"images_sha256": "b", "num_images": 11}, None),
        ({"images_sha256": None, "conventions": None}, None),
        ({"images_sha256": "b"}, "is of 10 other images than these"),
        ({"eval_fraction_seed": 1}, "has 10 images of d"),
        ({"dtype": "bfloat16"}, "was measured with dtype 'float32', not 'bfloat16'"),
        ({"batch_size": 7}, "was measured with batch_size 64, not 7: pass --overwrite"),
        ({"conventions": {"fd-timm:x": "224 x 224"}}, "was measured with fd-timm:x as '160 x 160', not '224 x 224'"),
    ],
)
def test_what_replaces_a_result(change, message, tmp_path):
    same = {"weights_sha256": "w", "dataset": "d", "split": "test", "batch_size": 64, "dtype": "float32"}
    same |= {"images_sha256": "a", "num_images": 10, "conventions": {"fd-timm:x": "160 x 160"}}
    earlier, new = {**same, "by_assignment": {"sinkhorn": {}}}, same | change
    rest = new["num_images"], ["sinkhorn"], ["fd-timm:x"], tmp_path
    if message is None:
        check_loses_nothing(earlier, new, *rest)
    else:
        with pytest.raises(ValueError, match=message):
            check_loses_nothing(earlier, new, *rest)


def test_another_batch_size_measures_nearest_codes_as_well(tmp_path):
    earlier = {"weights_sha256": "w", "batch_size": 64, "num_images": 10, "by_assignment": {"nearest": {}}}
    check_loses_nothing(earlier, {"weights_sha256": "w", "batch_size": 7}, 10, ["nearest"], [], tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "psnr", "lpips"], "unknown metric 'lpips': they are mse, psnr"),
        (["--metrics", "fd-keras:x"], "unknown metric 'fd-keras:x': they are mse"),
        (["--metrics", "psnr", "psnr"], "metrics names one twice: psnr psnr"),
        (["--model", "a", "a"], "model names one twice: a a"),
        (["--model", "a", "b", "--model-revision", "main"], "model_revision is of one model, got 2 models"),
        (["--protocol", "ours"], "argument --protocol: invalid choice"),
    ],
)
def test_wrong_words(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse(words)
    assert message in capsys.readouterr().err


def test_weights_that_are_not_at_hand_are_one_line(trained_folder, tmp_path, monkeypatch, capsys):
    def unreachable(*args, **options):
        raise OSError("no connection")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    line = fails(capsys, "--model", trained_folder, "--output-dir", tmp_path, "--metrics", "lpips_alex")
    assert "cannot download the ImageNet weights of 'alex' for LPIPS: no connection" in line
    assert "name no LPIPS in --metrics" in line


# ---- tables ----------------------------------------------------------------------------------------------------------


def make_row(model, **metrics):
    metrics = {"psnr": 20.126, "ssim": None, "codebook_usage": 100.0, **metrics}
    return Row(model, "nearest", {**metrics, "intervals": {"psnr": [20.0, 20.3], "ssim": None}})


def test_a_table_in_every_style():
    rows = [make_row("a_b", codebook_usage_per_head=[90.0, 80.25]), make_row("c", codebook_usage_per_head=[1.0, 2.0])]
    text, markdown, latex = (format_table(rows, ["psnr", "ssim", "fid"], style).splitlines() for style in STYLES)
    assert text == [
        "model | assignment |      PSNR dB | SSIM | usage % | usage % per head",
        "a_b   | nearest    | 20.13 ± 0.15 |    - |   100.0 |        90.0 80.2",
        "c     | nearest    | 20.13 ± 0.15 |    - |   100.0 |          1.0 2.0",
    ]
    assert markdown[2] == "| a_b | nearest | 20.13 ± 0.15 | - | 100.0 | 90.0 80.2 |"
    assert latex[:2] == [r"\begin{tabular}{llrrrr}", r"\toprule"] and latex[-1] == r"\end{tabular}"
    assert latex[4] == r"a\_b & nearest & 20.13 $\pm$ 0.15 & - & 100.0 & 90.0 80.2 \\"


def test_latex_takes_names_as_they_are():
    latex = format_table([make_row(r"C:\a_{b}~$50%^#&")], ["psnr"], "latex").splitlines()
    assert latex[4].startswith(r"C:\textbackslash{}a\_\{b\}\textasciitilde{}\$50\%\textasciicircum{}\#\& & nearest & ")


def test_a_mean_of_one_image_has_no_interval():
    row = Row("", "nearest", {"mse": 0.5, "fid": 3.0, "intervals": {"mse": None}})
    assert format_table([row], ["mse", "fid"]).splitlines()[1] == "nearest    |  0.5000 ± - | 3.00"


def test_a_table_of_one_model_with_one_head():
    lines = format_table([make_row("", codebook_usage_per_head=[100.0])], ["psnr"]).splitlines()
    assert lines[0] == "assignment |      PSNR dB | usage %"


# ---- what names and records promise ----------------------------------------------------------------------------------


def test_help_and_page_name_every_metric_and_protocol():
    fields = {field.name: field for field in dataclasses.fields(EvaluationArguments)}
    assert fields["metrics"].metadata["help"].endswith(f": {', '.join(METRICS)}")
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    assert [name for name in METRICS if f"`{name}`" not in page] == []
    check_metrics(METRICS)
    for name, protocol in PROTOCOLS.items():
        check_metrics(protocol.metrics)
        assert make_parser().parse(["--protocol", name])[0].protocol == name


def test_all_of_a_result_is_published_but_networks_in_folders(trained_folder, tmp_path, networks):
    evaluate(
        "--model", trained_folder, "--output-dir", tmp_path, "--metrics", "fid", "fd-timm:local-dir:mine", "lpips_alex"
    )
    report = read(tmp_path)
    published = known_entries("metrics.json", report)
    assert "mine" in str(report) and "mine" not in str(published)
    for name in ("by_assignment", "conventions"):
        report[name] = {key: value for key, value in report[name].items() if "mine" not in key}
    for figures in (report, *report["by_assignment"].values()):
        del figures["fd-timm:local-dir:mine"]
    assert published == report
