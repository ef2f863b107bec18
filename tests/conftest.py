import atexit
import os
import tempfile
from pathlib import Path

import pytest

from hub.loopback import LoopbackHub


# Nothing in the tests may reach a server outside: their Hub is on 127.0.0.1. Caches and tokens of the machine must not
# leak in. Set before any import of the stack; child processes inherit it.
HUB = LoopbackHub()
HF_HOME = tempfile.TemporaryDirectory(prefix="optvq_hf_home_")
atexit.register(HF_HOME.cleanup)
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_"))]:
    del os.environ[name]
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = HF_HOME.name
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def hf_home(tmp_path_factory):
    """datasets' Arrow cache goes to a temporary folder."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf_datasets")
    return datasets.config.HF_DATASETS_CACHE


@pytest.fixture(scope="session")
def hub() -> LoopbackHub:
    """The Hub that all tests of this process and their child processes talk to."""
    return HUB


@pytest.fixture(autouse=True)
def clean_hub(request):
    """A test that uses the hub fails if it leaves refused requests behind. Requests and faults are the test's own."""
    yield
    refused = list(HUB.refused)
    for left in (HUB.refused, HUB.requests, HUB.faults):
        left.clear()
    if "hub" in request.fixturenames:
        assert refused == [], "the Hub refused requests of this test"


@pytest.fixture
def alice(hub, monkeypatch) -> str:
    """The user alice is logged in. Her token."""
    token = hub.add_user("alice")
    monkeypatch.setenv("HF_TOKEN", token)
    return token


@pytest.fixture
def backoff_waits(monkeypatch) -> list[float]:
    """huggingface_hub retries without waiting. The seconds that it would have waited."""
    from types import SimpleNamespace

    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    waits = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
    return waits


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
