import io
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from builders import make, noise, plain_config
from optvq_hf.commands.tokenize import main
from optvq_hf.training.models import make_image_processor


@pytest.fixture(autouse=True)
def runs(fresh_run):
    """Tests here run commands."""


def encoded(number):
    content = io.BytesIO()
    PILImage.fromarray(noise(1, 20, number)[:, :, 0]).save(content, "png")
    return {"bytes": content.getvalue(), "path": f"{number}.png"}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A model of 16 x 16 grayscale pictures: 4 x 4 tokens of 2 codes in [0, 300), which need 16 bits."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = make(plain_config(image_size=16, num_channels=1, codebook_size=300))
    model.save_pretrained(folder)
    make_image_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """50 pictures with labels and names, as two files; that with number 17 is none."""
    folder = tmp_path_factory.mktemp("pictures")
    columns = {
        "image": [{"bytes": b"broken", "path": "17.png"} if number == 17 else encoded(number) for number in range(50)],
        "label": [number % 3 for number in range(50)],
        "name": [f"picture {number}" for number in range(50)],
    }
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"]), "name": Value("string")})
    rows = Dataset.from_dict(columns, features=features)
    rows.select(range(30)).to_parquet(folder / "train-00000-of-00002.parquet")
    rows.select(range(30, 50)).to_parquet(folder / "train-00001-of-00002.parquet")
    return folder


@pytest.fixture
def tokenize(model_folder, pictures):
    """tokenize(out, **flags) runs the command in this process."""

    def run(out, **flags):
        settings = {"model": model_folder, "dataset": pictures, "columns": "label", "shard_size": 20, "batch_size": 8}
        words = []
        for name, value in {**settings, "output_dir": out, **flags}.items():
            words += [f"--{name.replace('_', '-')}", *str(value).split(",")] if value is not None else []
        main(words)
        return Path(out)

    return run


@pytest.fixture
def fails(capsys):
    """fails() is the one line of a command that failed."""

    def read() -> str:
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("optvq tokenize: error: ")]
        return line

    return read
