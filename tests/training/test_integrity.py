"""A checkpoint with any changed byte is noticed and never resumed."""

import json
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from optvq_hf.commands.train import main
from optvq_hf.training.checkpoints import find_checkpoint, read_state, write_state
from optvq_hf.training.integrity import BrokenCheckpointError, checksums, sealed, unseal
from training.runs import flags, remove_result


def run(output_dir, **settings):
    main(flags(output_dir, **settings))


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """Two checkpoints, with discriminator and EMA, of a run that did not end."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(folder, max_steps=9, save_every=4, discriminator_start=2, eval_images=0)
    remove_result(folder)
    return folder


def tamper(path, generator):
    """Changes one byte or, in JSON, mostly a digit; adds or removes some bytes now and then."""
    content = bytearray(path.read_bytes())
    kind = generator.random()
    digits = [match.start() for match in re.finditer(rb"[0-9]", content)]
    if kind < 0.15:
        content = content[: -generator.randint(1, len(content))]
    elif kind < 0.25:
        content += b" " if path.suffix == ".json" else bytes(8)
    elif path.suffix == ".json" and digits and kind < 0.7:
        place = generator.choice(digits)
        content[place] = ord(generator.choice([digit for digit in "0123456789" if ord(digit) != content[place]]))
    else:
        content[generator.randrange(len(content))] ^= generator.randint(1, 255)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("number", [25, pytest.param(100, marks=pytest.mark.slow)])
def test_tampered_checkpoints(stopped_run, tmp_path, capsys, number):
    """Every file in turn: --resume auto takes the checkpoint before, and says so in one line; by name it is an error."""
    files = [path.relative_to(stopped_run / "checkpoint-8") for path in (stopped_run / "checkpoint-8").rglob("*")]
    files = sorted(path for path in files if (stopped_run / "checkpoint-8" / path).is_file())
    assert len(files) >= 9
    generator = random.Random(0)
    for index in range(number):
        folder = tmp_path / str(index)
        shutil.copytree(stopped_run, folder)
        tamper(folder / "checkpoint-8" / files[index % len(files)], generator)
        assert find_checkpoint("auto", folder) == folder / "checkpoint-4"
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith(f"checkpoint {folder / 'checkpoint-8'} is broken: ") and line.endswith(
            "trying the previous one"
        )
        with pytest.raises(BrokenCheckpointError, match="checkpoint-8 is broken"):
            find_checkpoint(str(folder / "checkpoint-8"), folder)
        shutil.rmtree(folder)
    assert find_checkpoint("auto", stopped_run) == stopped_run / "checkpoint-8"


def test_a_changed_digit_resumes_from_the_checkpoint_before(stopped_run, tmp_path, capsys):
    shutil.copytree(stopped_run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-8" / "training_state.json"
    path.write_text(path.read_text().replace('"step": 8', '"step": 7'))
    settings = {"max_steps": 9, "save_every": 4, "discriminator_start": 2, "eval_images": 0}
    with pytest.raises(SystemExit):
        run(tmp_path / "run", **settings, resume=tmp_path / "run" / "checkpoint-8")
    assert "training_state.json: it has changed since it was written" in capsys.readouterr().err
    run(tmp_path / "run", **settings, resume="auto")
    shown = capsys.readouterr().out
    assert "is broken" in shown and f"resuming {tmp_path / 'run' / 'checkpoint-4'}" in shown


def test_the_state_holds_its_own_checksum(tmp_path):
    entries = {"number": 0.1, "zeros": "0" * 64, "version": 3}
    text = sealed(entries).encode()
    assert unseal(text) == (entries, True)
    for place in range(len(text)):
        for flip in (1, 7, 16):  # 7 makes a line feed from a vertical tab and so on
            with pytest.raises(ValueError):
                changed = bytearray(text)
                changed[place] ^= flip
                unsealed, has_checksum = unseal(bytes(changed))
                assert not has_checksum and "version" in unsealed  # the key of the checksum itself was changed
                raise ValueError
    assert unseal(json.dumps(entries).encode()) == (entries, False)  # of an earlier format


def test_a_state_without_its_checksum_is_broken(stopped_run, tmp_path):
    shutil.copytree(stopped_run / "checkpoint-8", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "training_state.json"
    path.write_text(path.read_text().replace('"sha256"', '"sha255"', 1))
    with pytest.raises(BrokenCheckpointError, match="it has lost its checksum"):
        read_state(tmp_path / "checkpoint")


def test_a_configuration_of_another_run(stopped_run, tmp_path, capsys):
    """With checksums that fit, as of a checkpoint that was put together by hand."""
    shutil.copytree(stopped_run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-8"
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "training_assignment": "nearest"}))
    state = read_state(checkpoint)
    state.files["config.json"] = checksums(checkpoint)["config.json"]
    write_state(checkpoint, state)
    with pytest.raises(SystemExit):
        run(tmp_path / "run", max_steps=9, save_every=4, discriminator_start=2, eval_images=0, resume="auto")
    shown = capsys.readouterr().err
    assert f"{checkpoint} is broken: config.json has training_assignment 'nearest', its run 'sample'" in shown


def test_other_images_are_not_resumed(tmp_path, capsys):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature
    from PIL import Image

    def write(folder, first):
        folder.mkdir()
        images = [Image.new("L", (16, 16), first + number) for number in range(40)]
        Dataset.from_dict({"image": images}, Features({"image": ImageFeature()})).to_parquet(folder / "train.parquet")
        return {"dataset": folder, "eval_split": "train[:8]"}

    settings = {"max_steps": 5, "save_every": 4, "eval_images": 0}
    run(tmp_path / "run", **settings, **write(tmp_path / "images", 0))
    remove_result(tmp_path / "run")
    before = (tmp_path / "run" / "training_log.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        run(tmp_path / "run", **settings, **write(tmp_path / "others", 100), resume="auto")
    assert "the training images are not those that the run has read" in capsys.readouterr().err
    assert (tmp_path / "run" / "training_log.jsonl").read_bytes() == before
    (tmp_path / "images").rename(tmp_path / "moved")
    run(tmp_path / "run", **settings, dataset=tmp_path / "moved", eval_split="train[:8]", resume="auto")
    assert "resuming" in capsys.readouterr().out


def test_the_tensors_of_a_checkpoint_that_was_written_anew(stopped_run, tmp_path):
    """A file of the same size whose header is fine, but with another number."""
    shutil.copytree(stopped_run / "checkpoint-8", tmp_path / "checkpoint-8")
    path = tmp_path / "checkpoint-8" / "training_state.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.float32 and tensor.numel() > 1)
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, path)
    with pytest.raises(BrokenCheckpointError, match="training_state.safetensors has changed since it was written"):
        find_checkpoint(str(tmp_path / "checkpoint-8"), tmp_path)
