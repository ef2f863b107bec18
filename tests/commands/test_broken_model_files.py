"""Wrong types in the files of a model: one clear line, no stack trace, whatever the file holds."""

import json
import random
import re
import shutil

import pytest

from grids import slow
from hub.checks import fails
from optvq_hf.commands import evaluate, publish, train
from optvq_hf.commands.cli import main
from optvq_hf.training.models import load_model
from training.runs import flags


GARBAGE = (
    None, True, -1, 0, 3, 1.5, 10**30, -(10**400), "", "x", "sinkhorn", "1e400", [], [[]], ["x", 3], [10**30], {}, {"a": 1},
    {"a": {"b": [{}]}}, float("nan"), float("inf"), [[[[[1]]]]], "\ud83d\ude00" * 50, {"__class__": "x"},
)  # fmt: skip
ENTRIES = (
    "dtype", "torch_dtype", "to_dict", "__class__", "__init__", "validate", "architectures", "auto_map", "id2label", "label2id",
    "num_labels", "attribute_map", "sub_configs", "base_config_key", "quantization_config", "output_hidden_states",
    "return_dict", "_attn_implementation", "attn_implementation", "custom_pipelines", "training_schedules", "_auto_class",
    "converted_from",
    "model_type", "transformers_version", "is_encoder_decoder", "chunk_size_feed_forward", "fixed_fields", "head_dim",
    "name_or_path", "_name_or_path", "use_cache", "problem_type", "keys_to_ignore_at_inference", "per_layer_config",
)  # fmt: skip
TEXTS = (
    b"", b"{", b"[]", b"3", b"null", b'"x"', b"[" * 100_000, b"\xff\xfe\x00", b'{"a": 1' + b"0" * 5000 + b"}", b"{} {}",
    b'{"model_type": "optvq", "codebook_size": 1' + b"0" * 5000 + b"}", b'{"model_type": ["optvq"]}', b"\x00" * 100,
)  # fmt: skip


def variants(record: dict, names: tuple[str, ...], number: int) -> list[bytes]:
    """Texts of a file: some that are no record, and the record with one to three wrong entries."""
    chance = random.Random(0)
    texts = list(TEXTS)
    while len(texts) < number:
        wrong = {chance.choice([*record, *names]): chance.choice(GARBAGE) for _ in range(chance.randint(1, 3))}
        texts.append(json.dumps({**record, **wrong}).encode())
    return texts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.main(flags(folder, max_steps=4, save_every=2, adversarial_weight=0, lecam_weight=0, ema_decay=0))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def run(capsys, argv) -> str:
    """The one line of a command that fails; nothing if it succeeds."""
    capsys.readouterr()
    try:
        main([str(word) for word in argv])
    except SystemExit as ended:
        assert ended.code == 1
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"optvq {argv[0]}: error: ") and 20 < len(line) < 3000, line
        return line
    return ""


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_wrong_types(folder, tmp_path, capsys, name):
    path = folder / name
    record = json.loads(path.read_text())
    refused = 0
    texts = variants(record, ENTRIES if name == "config.json" else ("traps",), 120 if name == "config.json" else 50)
    for number, text in enumerate(texts):
        path.write_bytes(text)
        try:
            load_model(str(folder))
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and "cannot load model" in str(error), error
            refused += 1
            commands = {
                "evaluate": ["--model", folder, "--dataset", "fashion_mnist_sample", "--max-images", "8"],
                "publish": [folder, "alice/x", "--dry-run"],
                "train": flags(tmp_path / "out", model=folder, max_steps=1),
            }
            command = list(commands)[number % 3]
            # Only what a model is started from is of interest: its sizes are in the file.
            assert run(capsys, [command, *commands[command]]), (text, error)
        else:
            # What is taken also works: it is published, and evaluated.
            run(capsys, ["publish", folder, "alice/x", "--dry-run"])
            more = ["--max-images", "8", "--output-dir", tmp_path / "evaluation"]
            run(capsys, ["evaluate", "--model", folder, "--dataset", "fashion_mnist_sample", *more])
    assert refused > len(texts) / 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "training_state.json"])
def test_of_a_checkpoint(folder, tmp_path, capsys, name):
    """A run that is started from it, or resumed, and the checkpoint published as a model."""
    path = folder / "checkpoint-2" / name
    record = json.loads(path.read_text())
    for text in variants(record, ENTRIES, 30):
        path.write_bytes(text)
        run(capsys, ["publish", path.parent, "alice/x", "--dry-run"])
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        of_run = {"max_steps": 4, "save_every": 2, "adversarial_weight": 0, "lecam_weight": 0, "ema_decay": 0}
        run(capsys, ["train", *flags(tmp_path / "again", **of_run, resume=path.parent)])


@pytest.mark.parametrize("number", [30, slow(60)])
@pytest.mark.parametrize("name", ["metrics.json", "training_summary.json", "conversion.json"])
def test_of_a_record(folder, capsys, name, number):
    if name == "conversion.json":
        entries = {"source": "a/b", "revision": None, "license": "mit", "notes": [], "left_out": []}
        (folder / name).write_text(json.dumps({**entries, "has_discriminator": False}))
    path = folder / name
    record = json.loads(path.read_text())
    refused = 0
    texts = variants(record, ("dataset_id", "num_unreadable", "weights_sha256"), number)
    if name == "metrics.json":
        wrong = [{**record["by_assignment"]["nearest"], "mse": value} for value in GARBAGE]
        texts += [json.dumps({**record, "by_assignment": {"nearest": values}}).encode() for values in wrong]
    for text in texts:
        path.write_bytes(text)
        refused += bool(run(capsys, ["publish", folder, "alice/x", "--dry-run"]))
    assert refused > len(texts) / 3


def test_results_of_an_earlier_evaluation(folder, capsys):
    """They are asked whether a new result says less."""
    path = folder / "metrics.json"
    for text in variants(json.loads(path.read_text()), ("eval_fraction",), 20):
        path.write_bytes(text)
        run(capsys, ["evaluate", "--model", folder, "--dataset", "fashion_mnist_sample", "--max-images", "8"])


def test_known_faults_say_what_is_wrong(folder, capsys):
    path = folder / "config.json"
    record = json.loads(path.read_text())
    for entry, message in [
        ({"dtype": "x"}, "dtype"),
        ({"to_dict": 3}, "OptVQConfig has no field 'to_dict'"),
        ({"__class__": "x"}, "OptVQConfig has no field '__class__'"),
        ({"codebook_size": [3]}, "codebook_size.*expected int, got list"),
        ({"num_labels": 10**9}, "OptVQConfig has no field 'num_labels'"),
        ({"auto_map": [1]}, "auto_map"),
        ({"training_schedules": {"sinkhorn_epsilon": [1]}}, "training_schedules must have two values each"),
        ({"return_dict": False}, "return_dict must be true"),
        ({"codebook_dim": 10**12}, "must be at most 65,536"),
    ]:
        path.write_text(json.dumps({**record, **entry}))
        for command, argv in (
            (evaluate, ["--model", folder, "--dataset", "fashion_mnist_sample"]),
            (publish, [folder, "alice/x", "--card-only"]),
        ):
            line = fails(command, argv, capsys)
            assert re.search(message, line), line
