"""200 generated wrong command lines, recipes and settings: each ends with one line, and never with a stack trace."""

import random

import pytest

from grids import slow
from optvq_hf.commands.cli import main


DATA = ["--dataset", "fashion_mnist_sample"]
SMALL = [
    "--backbone",
    "plain_cnn",
    "--image-size",
    "32",
    "--num-channels",
    "1",
    "--codebook-size",
    "64",
    "--codebook-dim",
    "8",
]
WORDS = ["", "nan", "inf", "-1", "1e999", "many", "0x10", "1:30", "None", "[1]", "9" * 5000, "\x00", "ä", "-"]
NUMBERS = [
    "batch-size", "max-steps", "num-epochs", "gradient-accumulation-steps", "save-every", "keep-checkpoints", "eval-images",
    "codebook-size", "num-codebook-heads", "image-size", "sinkhorn-iterations", "log-every", "shuffle-buffer", "num-workers",
    "discriminator-start", "codebook-start-batches", "reseed-dead-codes-after",
]  # fmt: skip
RATES = [
    "learning-rate", "warmup-ratio", "adam-beta2", "weight-decay", "max-grad-norm", "ema-decay", "l1-weight", "l2-weight",
    "perceptual-weight", "adversarial-weight", "lecam-weight", "sinkhorn-epsilon", "sinkhorn-balance", "dropout",
    "codebook-ema-decay", "commitment-loss-weight", "max-unreadable", "eval-fraction", "discriminator-learning-rate",
]  # fmt: skip
CHOICES = [
    "backbone", "training-assignment", "inference-assignment", "cost-normalization", "codebook-loss-type", "mixed-precision",
    "report-to", "codebook-start", "perceptual-network", "discriminator-loss", "codebook-update",
]  # fmt: skip
LINES = [
    "batch_size: null", "batch_size: [1, 2]", "batch_size: {a: 1}", "batch_size: 010", "max_steps: 1:30",
    "batch_size: 1\nbatch_size: 2", "learning_rate: .nan", "learning_rate: .inf", "learning_rate: " + "9" * 5000,
    "epsilon_schedule: 3", "epsilon_schedule: [1]", "epsilon_schedule: [1, x]", "epsilon_schedule: [[1], [2]]",
    "unknown: 1", "batch-size: 3", "? [a, b]\n: 1", "- a\n- b", "just words", "a: b: c", "\tbatch_size: 1",
    "batch_size: !!python/none", "seed: " + "[" * 2000, "x: &a [1]\nbatch_size: *a", "batch_size: *b", "output_dir: {}",
    "streaming: maybe", "backbone: resnet", "\x00", "---\na: 1\n---\nb: 2", "batch_size: 1.5", "dropout: .nan",
    "codebook_size: 0", "max_steps: 0x10",
]  # fmt: skip


def one_of(tmp_path, model, number) -> list[str]:
    """A wrong command line."""
    out = ["--output-dir", str(tmp_path / "out")]
    flag, value = random.choice([*NUMBERS, *RATES, *CHOICES]), random.choice(WORDS)
    recipe = tmp_path / f"{number}.yaml"
    recipe.write_text(random.choice(LINES), errors="surrogatepass")
    missing = str(tmp_path / "missing")
    return random.choice(
        [
            ["train", *DATA, *SMALL, *out, f"--{flag}={value}"],
            ["train", *DATA, *SMALL, *out, f"--{flag}", value],
            ["train", *DATA, *SMALL, *out, f"--{flag}x", value],
            [
                "train",
                *DATA,
                *SMALL,
                *out,
                "--epsilon-schedule",
                *random.choice([["1"], ["1", "nan"], ["0", "1"], ["x", "2"]]),
            ],
            ["train", *DATA, *SMALL, *out, "--config", str(recipe)],
            [
                "train",
                *SMALL,
                *out,
                "--dataset",
                random.choice([missing, "", "a/b/c", str(tmp_path / "*.gz"), str(recipe)]),
            ],
            ["train", *DATA, *SMALL, *out, "--train-split", random.choice(["none", "train[:x]", "", "train[:200%]"])],
            ["train", *DATA, *out, "--model", random.choice([missing, str(recipe), "a/b/c", ""])],
            ["train", *DATA, *SMALL, *out, "--resume", random.choice([missing, str(recipe)])],
            ["train", *DATA, *SMALL, *out, "--image-column", random.choice(["none", ""])],
            ["train", *DATA, *SMALL, "--output-dir", str(recipe / "out")],
            ["evaluate", "--model", random.choice([missing, "", str(recipe)]), *DATA],
            [
                "evaluate",
                "--model",
                model,
                *DATA,
                "--assignment",
                *random.choice([["nearest", "nearest"], ["best"], [""]]),
            ],
            ["evaluate", "--model", model, *DATA, *out, f"--{random.choice(['batch-size', 'max-images'])}={value}"],
            ["evaluate", "--model", model, "--dataset", missing],
            ["publish", random.choice(["", missing, str(recipe)]), random.choice(["me/model", ""]), "--dry-run"],
            ["publish", model, random.choice(["", "noslash", "a/b/c", "a b/c"]), "--dry-run"],
            ["convert", random.choice([missing, str(recipe), ""]), str(tmp_path / "converted")],
            [random.choice(["tarin", "", "--nothing"])],
        ]
    )


@pytest.mark.parametrize("total", [40, slow(200)])
def test_wrong_command_lines(tmp_path, trained_folder, capsys, monkeypatch, total):
    random.seed(0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    faults = []
    for number in range(total):
        words = one_of(tmp_path, str(trained_folder), number)
        shown = " ".join(word if len(word) < 60 else f"{word[:20]}..." for word in words[:1] + words[-4:])
        if "--config" in words:
            shown += f" ({(tmp_path / f'{number}.yaml').read_text(errors='replace')[:50]!r})"
        try:
            main(words)
            faults.append(f"{number}: {shown}: accepted")
        except SystemExit as stop:
            lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
            if stop.code not in (1, 2) or len(lines) != 1 or not 20 < len(lines[0]) < 700:
                faults.append(f"{number}: {shown}: exit code {stop.code}, {lines}")
        except BaseException as error:  # noqa: BLE001  the stack traces that this test looks for
            faults.append(f"{number}: {shown}: {type(error).__name__}: {str(error)[:200]}")
        capsys.readouterr()
    if faults:
        pytest.fail("\n".join(faults))


@pytest.mark.parametrize("flag", ["model", "output-dir", "dataset", "config", "train-split", "resume", "push-to-hub"])
@pytest.mark.parametrize("value", ["", "  "])
def test_a_variable_that_is_not_set(flag, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", *DATA, f"--{flag}", value])
    assert f"--{flag}" in capsys.readouterr().err
