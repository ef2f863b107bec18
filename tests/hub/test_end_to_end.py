"""The way of a model: trained, published, loaded by somebody without this package, trained further, published again."""

import json
import os
import subprocess
import sys
import time

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from optvq_hf import OptVQImageProcessor, OptVQModel
from optvq_hf.commands import publish, train
from optvq_hf.data.loading import EMBEDDED
from training.runs import finish, flags, kill, read_log, start, wait_for_step, weights


pytestmark = pytest.mark.hub
SHORT = {"save_every": 0, "images_every": 0, "eval_split": "test[:40]"}

ELSEWHERE = """
import sys
sys.modules["optvq_hf"] = None  # importing it is an error
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageToImage, pipeline

repo_id, folder = sys.argv[1:]
options = {"trust_remote_code": True}
model = AutoModel.from_pretrained(repo_id, **options)
image_processor = AutoImageProcessor.from_pretrained(repo_id, **options)
pictures = [Image.open(f"{folder}/{number}.png") for number in range(5)]
pixel_values = image_processor(pictures, return_tensors="pt").pixel_values
codes = model.encode(pixel_values).codes
tokenize = pipeline("image-tokenization", model=repo_id, **options)
reconstruct = pipeline("image-reconstruction", model=repo_id, **options)
features = pipeline("image-feature-extraction", model=repo_id, **options)(pictures, return_tensors=True)
assert type(AutoModelForImageToImage.from_pretrained(repo_id, **options)).__name__ == "OptVQModel"
torch.save(
    {
        "codes": codes,
        "reconstruction": model.decode(codes=codes).reconstruction,
        "tokenized": torch.stack([result["codes"] for result in tokenize(pictures, batch_size=2)]),
        "reconstructed": [result["image"].tobytes() for result in reconstruct(pictures, batch_size=2)],
        "features": torch.cat(features),
    },
    f"{folder}/elsewhere.pt",
)
output = model.train()(pixel_values)  # it can be trained there, and saved with its code
(output.reconstruction.square().mean() + output.loss).backward()
assert all(parameter.grad is not None for parameter in model.parameters())
model.eval().save_pretrained(f"{folder}/saved")
again = AutoModel.from_pretrained(f"{folder}/saved", **options)
assert torch.equal(again.encode(pixel_values).codes, codes)
"""


def test_from_training_to_a_second_revision(hub, alice, tmp_path):
    train.main(flags(tmp_path / "run", max_steps=20, **SHORT))
    pictures = [Image.effect_noise((20, 24), 60 + number) for number in range(5)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    model = OptVQModel.from_pretrained(tmp_path / "run")
    image_processor = OptVQImageProcessor.from_pretrained(tmp_path / "run")
    encoded = model.encode(image_processor(pictures, return_tensors="pt").pixel_values)
    reconstruction = model.decode(codes=encoded.codes).reconstruction

    publish.main([str(tmp_path / "run"), "alice/way"])
    environment = {**os.environ, "HF_HOME": str(tmp_path / "empty"), "PYTHONPATH": ""}
    del environment["HF_TOKEN"]
    command = [sys.executable, "-c", ELSEWHERE, "alice/way", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "elsewhere.pt")
    assert torch.equal(found["codes"], encoded.codes) and torch.equal(found["tokenized"], encoded.codes)
    assert torch.equal(found["reconstruction"], reconstruction)
    assert found["reconstructed"] == [picture.tobytes() for picture in image_processor.postprocess(reconstruction)]
    assert torch.equal(found["features"], encoded.quantized)

    train.main(flags(tmp_path / "tuned", max_steps=5, model="alice/way", **SHORT))
    publish.main([str(tmp_path / "tuned"), "alice/way", "--revision", "tuned"])
    first, tuned = (AutoModel.from_pretrained("alice/way", revision=name) for name in ("main", "tuned"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(first.state_dict()[name], tensor), name
    assert not torch.equal(first.get_codebook(), tuned.get_codebook())
    by_tuner = OptVQModel.from_pretrained(tmp_path / "tuned")
    assert torch.equal(tuned.get_codebook(), by_tuner.get_codebook())
    assert (
        "It began with the weights of `alice/way`" in hub.repository("alice/way").files("tuned")["README.md"].decode()
    )


def test_a_stream_from_the_hub_goes_on_where_it_was_killed(hub, alice, tmp_path):
    sample = datasets.load_dataset("parquet", data_files=str(EMBEDDED["fashion_mnist_sample"] / "*.parquet"))
    for split, images in (("train", range(800)), ("test", range(800, 840))):
        sample["train"].select(images).push_to_hub("alice/sample", split=split, num_shards=4)
    settings = {
        "dataset": "alice/sample",
        "eval_split": "test",
        "streaming": "true",
        "shuffle_buffer": 50,
        "max_steps": 40,
    }
    settings |= {"num_workers": 2}
    finish(start(tmp_path / "whole", **settings))
    run = start(tmp_path / "killed", **settings)
    wait_for_step(run, tmp_path / "killed", 18)
    kill(run)
    run.wait()
    assert "resuming" in finish(start(tmp_path / "killed", resume="auto", **settings))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[key], other[key]) for key in one)
    without_time = [
        [{k: v for k, v in entry.items() if k not in ("images_per_second", "data_wait")} for entry in read_log(folder)]
        for folder in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert without_time[0] == without_time[1]


def test_a_run_pushes_its_checkpoints_and_goes_on_from_them(hub, alice, tmp_path):
    """On another machine, which has nothing but the Hub."""
    settings = {"max_steps": 30, "save_every": 10, "eval_split": "test[:40]"}
    finish(start(tmp_path / "whole", **settings))
    run = start(tmp_path / "lost", push_to_hub="alice/lost", **settings)
    while ("model", "alice/lost") not in hub.repositories or len(hub.repository("alice/lost").commits) < 2:
        time.sleep(0.05)
        assert run.poll() is None, run.communicate()[0][-3000:]
    kill(run)
    run.wait()
    repository = hub.repository("alice/lost")
    assert repository.commits[1].message.startswith("Checkpoint ")
    files = repository.files()
    assert "None were measured on these weights" in files["README.md"].decode() and "pipeline_optvq.py" in files
    assert "last-checkpoint/training_state.json" in files
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert OptVQModel.from_pretrained("alice/lost").config.image_size == 16
    finish(start(tmp_path / "elsewhere", resume="alice/lost", push_to_hub="alice/lost", **settings))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "elsewhere")
    assert all(torch.equal(one[key], other[key]) for key in one)
    logs = read_log(tmp_path / "whole"), read_log(tmp_path / "elsewhere")
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]]
    files = repository.files()
    assert repository.commits[-1].message == "Publish lost" and not [name for name in files if "checkpoint" in name]
    assert json.loads(files["metrics.json"])["num_images"] == 40
