import os
from pathlib import Path

import pytest


# Nothing in the tests may reach a server, and caches of the machine must not leak in. Set before any import of the stack.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def hf_home(tmp_path_factory):
    """datasets' Arrow cache goes to a temporary folder."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf_datasets")
    return datasets.config.HF_DATASETS_CACHE


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps the precision of the first run of a process."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Inputs and outputs of the original implementation."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"the reference's golden values are not at {SHARED / 'golden'}")
    return SHARED / "golden"


GOLDEN_COUNTS = pytest.StashKey[dict]()


@pytest.fixture
def count_golden(request):
    """Counts the stored cases of the original that a test has compared; the summary of the run prints them."""
    counts = request.config.stash.setdefault(GOLDEN_COUNTS, {})

    def count(kind: str, number: int = 1):
        counts[kind] = counts.get(kind, 0) + number

    return count


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash.get(GOLDEN_COUNTS, {})
    if counts:
        terminalreporter.section("stored cases of the original implementation")
        for kind, number in sorted(counts.items()):
            terminalreporter.write_line(f"{number:5} {kind}")


@pytest.fixture(scope="session")
def image_data() -> Path:
    """Folder with MNIST and other image datasets as Parquet."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"the image datasets are not at {SHARED / 'data'}")
    return SHARED / "data"


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory) -> Path:
    """What `optvq train` leaves behind after 60 steps on the embedded dataset."""
    from optvq_hf.commands.train import main

    folder = tmp_path_factory.mktemp("trained") / "run"
    recipe = Path(__file__).parents[1] / "scripts" / "recipes" / "quickstart.yaml"
    main(["--config", str(recipe), "--max-steps", "60", "--output-dir", str(folder), "--images-every", "30"])
    return folder


@pytest.fixture(scope="session")
def trained_model(trained_folder):
    from optvq_hf import OptVQModel

    return OptVQModel.from_pretrained(trained_folder)


@pytest.fixture(scope="session")
def test_pixels(trained_folder):
    """(1000, 1, 32, 32): the embedded test split."""
    import torch

    from optvq_hf import OptVQImageProcessor
    from optvq_hf.data.arguments import DataArguments
    from optvq_hf.data.batches import evaluation_batches

    image_processor = OptVQImageProcessor.from_pretrained(trained_folder)
    return torch.cat(list(evaluation_batches(DataArguments(dataset="fashion_mnist_sample"), image_processor, 250)))
