"""A user's mistake ends in one clear line: exit code 2 for a wrong argument, 1 for a failed run."""

import re
import shutil
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from optvq_hf import OptVQImageProcessor, OptVQModel
from optvq_hf.commands.cli import main
from optvq_hf.commands.errors import one_line_errors


SMALL = ["--backbone", "plain_cnn", "--image-size", "32", "--codebook-size", "64", "--codebook-dim", "8"]
SMALL += ["--report-to", "none", "--max-steps", "1", "--batch-size", "2"]


def check(capsys, argv, code, message):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert stopped.value.code == code and len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "--dataset is missing"),
        (["train", "--dataset", "x", "--streaming", "--backbone", "plain_cnn"], "--streaming needs --max-steps"),
        (["train", "--dataset", "x", "--codebook-dim", "10"], "divisible by num_codebook_heads, got 10 and 4"),
        (["train", "--dataset", "x", "--image-size", "100"], "image_size must be divisible .* 16, got 100"),
        (["evaluate"], "--model is missing"),
        (["evaluate", "--model", "x"], "--dataset is missing"),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    check(capsys, argv, 2, message)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--codebook-size", "1" + "0" * 23, "codebook_size must be at most 2,147,483,647"),
        ("--codebook-dim", "1" + "0" * 12, "codebook_dim must be at most 65,536"),
        ("--batch-size", "1" + "0" * 20, "batch_size may be at most 1,000,000"),
        ("--eval-images", "1" + "0" * 20, "eval_images may be at most"),
        ("--max-steps", "1" + "0" * 20, "max_steps may be at most"),
        ("--eval-fraction-seed", "-1", "eval_fraction_seed must be 0 or greater, got -1"),
        ("--seed", "-1", "seed must be 0 or greater, got -1"),
        ("--seed", "1" + "0" * 20, "seed may be at most"),
        ("--discriminator-layers", "100000", "discriminator_layers may be at most 16"),
        ("--gradient-accumulation-steps", "100000000", "gradient_accumulation_steps may be at most 10,000"),
        ("--channel-multiplier", "1000000", "a layer at most 65,536 channels"),
    ],
)
def test_numbers_that_cannot_be_meant(capsys, flag, value, message):
    check(capsys, ["train", "--dataset", "fashion_mnist_sample", flag, value], 2, message)
    if flag == "--batch-size":
        evaluation = ["evaluate", "--model", "x", "--dataset", "x"]
        check(capsys, [*evaluation, flag, value], 2, message)
        check(capsys, [*evaluation, "--max-images", value], 2, "max_images may be at most")


def test_sizes_that_overflow_together(capsys, tmp_path):
    sizes = ["--image-size", "65536", "--batch-size", "1000000", "--num-channels", "60000", "--backbone", "plain_cnn"]
    words = ["--dataset", "fashion_mnist_sample", "--report-to", "none", "--output-dir", str(tmp_path), *sizes]
    check(capsys, ["train", *words], 1, "sizes of the run are too large together")


@pytest.mark.parametrize(("size", "layers", "least"), [("16", "3", "24"), ("32", "6", "192")])
def test_images_that_are_too_small_for_the_discriminator(capsys, tmp_path, size, layers, least):
    flags = ["--dataset", "fashion_mnist_sample", "--num-channels", "1", "--output-dir", str(tmp_path)]
    flags += ["--adversarial-weight", "1", "--image-size", size, "--discriminator-layers", layers]
    message = (
        f"this discriminator needs images of at least {least} pixels, got {size} x {size}: lower --discriminator-layers"
    )
    check(capsys, ["train", *SMALL, *flags], 1, message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "no-one/nothing"], "cannot load dataset 'no-one/nothing'"),
        (
            ["--dataset", "fashion_mnist_sample", "--image-column", "img"],
            "no column 'img'; its columns are .'image', 'label'.",
        ),
        (["--dataset", "fashion_mnist_sample", "--train-split", "dev"], "cannot load dataset .*, split 'dev'"),
        (["--dataset", "fashion_mnist_sample", "--eval-split", "valid"], "cannot load dataset .*, split 'valid'"),
        (
            ["--dataset", "fashion_mnist_sample", "--train-split", "train[:1]"],
            "has 1 images, fewer than one batch of 2",
        ),
        (["--dataset", "fashion_mnist_sample", "--model", "/no/such/model"], "/no/such/model"),
    ],
)
def test_failed_trainings(hub, capsys, tmp_path, flags, message):
    check(capsys, ["train", *SMALL, "--output-dir", str(tmp_path), *flags], 1, message)


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_too_many_unreadable_images_stop_the_run_with_the_name_of_one(capsys, tmp_path, num_workers):
    (tmp_path / "data").mkdir()
    for number in range(2):
        Image.new("RGB", (40, 40)).save(tmp_path / "data" / f"{number}.png")
    (tmp_path / "data" / "2.png").write_bytes(b"broken")
    flags = [
        "--dataset",
        str(tmp_path / "data"),
        "--batch-size",
        "3",
        "--num-workers",
        num_workers,
        "--eval-split",
        "train",
        "--max-unreadable",
        "0",
    ]
    check(
        capsys,
        ["train", *SMALL, "--output-dir", str(tmp_path / "out"), *flags],
        1,
        "1 of 3 images cannot be read, --max-unreadable is 0; the last: cannot read image .*2.png: not an image",
    )


def test_an_output_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["--dataset", "fashion_mnist_sample", "--output-dir", str(tmp_path / "file" / "run"), "--num-channels", "1"]
    check(capsys, ["train", *SMALL, *flags], 1, "cannot write to .*run: .*file is not a folder")


def test_nothing_is_trained_before_a_mistake_is_found(capsys, tmp_path):
    flags = ["--dataset", "fashion_mnist_sample", "--num-channels", "1", "--output-dir", str(tmp_path / "out")]
    check(capsys, ["train", *SMALL, *flags, "--eval-split", "valid"], 1, "valid")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--codebook-dim", "16"],
            r"cannot load model .*conv.* is \(.*\) in its weights, and would be \(.*16.* with these",
        ),
        (
            ["--codebook-update", "gradient", "--use-codebook-projection", "true"],
            "its weights lack quantizer.projection.bias, quantizer.projection.weight",
        ),
        (["--num-codebook-heads", "3"], "codebook_dim must be divisible by num_codebook_heads, got 8 and 3"),
    ],
)
def test_fields_that_do_not_fit_the_weights(capsys, trained_folder, tmp_path, flags, message):
    base = ["train", "--dataset", "fashion_mnist_sample", "--max-steps", "1", "--report-to", "none"]
    check(capsys, [*base, "--model", str(trained_folder), "--output-dir", str(tmp_path), *flags], 1, message)


def test_models_that_are_none(capsys, trained_folder, tmp_path):
    data = ["--dataset", "fashion_mnist_sample"]
    broken = tmp_path / "broken"
    shutil.copytree(trained_folder, broken)
    (broken / "model.safetensors").write_bytes((trained_folder / "model.safetensors").read_bytes()[:1000])
    check(capsys, ["evaluate", "--model", str(broken), *data], 1, "cannot load model '.*broken'")
    BertConfig().save_pretrained(tmp_path / "bert")
    check(capsys, ["evaluate", "--model", str(tmp_path / "bert"), *data], 1, "its model type is 'bert', not 'optvq'")
    state = load_file(trained_folder / "model.safetensors")
    del state["decoder.0.weight"]
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    check(capsys, ["evaluate", "--model", str(broken), *data], 1, "its weights lack decoder.0.weight")


def train_further(folder, output_dir, *flags):
    data = ["--dataset", "fashion_mnist_sample", "--eval-split", "test[:8]"]
    run = ["--max-steps", "1", "--report-to", "none", "--output-dir", str(output_dir)]
    main(["train", "--model", str(folder), *data, *run, *flags])


def test_another_size_or_number_of_channels_of_pictures(trained_folder, tmp_path):
    train_further(trained_folder, tmp_path, "--image-size", "64")
    assert OptVQImageProcessor.from_pretrained(tmp_path).crop_size.height == 64


@pytest.mark.parametrize(("flag", "size", "width"), [("--codebook-size", 32, 2), ("--num-codebook-heads", 1024, 4)])
def test_another_codebook(trained_folder, tmp_path, caplog, flag, size, width):
    train_further(trained_folder, tmp_path, flag, "32" if flag == "--codebook-size" else "2")
    made_anew = f"made anew: the codebook of {size} codes of width {width}, with its projection and running state"
    assert [record.getMessage() for record in caplog.records if "made anew" in record.getMessage()] == [made_anew]
    assert OptVQModel.from_pretrained(tmp_path).quantizer.num_updates == 1


def test_processes_that_do_not_know_of_each_other(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--dataset", "fashion_mnist_sample", "--num-channels", "1", "--output-dir", str(tmp_path)]
    check(
        capsys, ["train", *SMALL, *flags], 1, "2 processes were started, but each works alone.*ACCELERATE_USE_CPU=true"
    )


def test_a_diverging_run_says_what_to_do(capsys, tmp_path):
    flags = [
        "--dataset",
        "fashion_mnist_sample",
        "--num-channels",
        "1",
        "--output-dir",
        str(tmp_path),
        "--max-steps",
        "30",
    ]
    flags += ["--learning-rate", "1e30", "--max-grad-norm", "1e30", "--log-every", "1"]
    check(capsys, ["train", *SMALL, *flags], 1, "step [0-9]+.*a lower learning rate may help")


def test_a_model_that_does_not_exist(capsys):
    check(capsys, ["evaluate", "--model", "/no/such", "--dataset", "fashion_mnist_sample"], 1, "/no/such")


def test_missing_extras_are_named(capsys, tmp_path, monkeypatch):
    for tracker in ("tensorboard", "trackio", "wandb"):
        monkeypatch.setitem(sys.modules, tracker, None)
        flags = [*SMALL, "--dataset", "fashion_mnist_sample", "--report-to", tracker, "--output-dir", str(tmp_path)]
        check(
            capsys,
            ["train", *flags],
            1,
            f"{tracker} is not installed: run pip install {tracker}, or pass --report-to none",
        )


def test_the_trace_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("OPTVQ_TRACEBACK", "1")
    with pytest.raises(ValueError, match="why"), one_line_errors("train"):
        raise ValueError("why")


def test_interrupts_and_bugs(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors("train"):
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err == "optvq train: interrupted\n"
    with pytest.raises(ZeroDivisionError), one_line_errors("train"):  # not the user's mistake: keeps its trace
        raise ZeroDivisionError
