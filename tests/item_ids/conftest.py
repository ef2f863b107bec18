from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from optvq_hf.commands.ids import main


@pytest.fixture(autouse=True)
def runs(fresh_run):
    """Tests here run commands."""


def clusters(items: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    """Embeddings in clusters of very different sizes: cluster n has a share of 1 / n of them."""
    random = np.random.default_rng(seed)
    shares = 1 / np.arange(1, 31)
    centres = 3 * np.random.default_rng(0).standard_normal((30, dim))
    return (centres[random.choice(30, items, p=shares / shares.sum())] + random.standard_normal((items, dim))).astype(
        "f4"
    )


def write_rows(path: Path, vectors, keys) -> Path:
    pq.write_table(pa.table({"item": pa.array(keys), "vector": pa.array(list(vectors))}), path)
    return path


@pytest.fixture(scope="session")
def items(tmp_path_factory) -> Path:
    """600 items with text as keys."""
    return write_rows(
        tmp_path_factory.mktemp("items") / "items.parquet", clusters(600), [f"i{n:03}" for n in range(600)]
    )


@pytest.fixture
def ids(items):
    """ids(out, **flags) runs the command in this process: 3 levels of 16 codes."""

    def run(out, **flags) -> Path:
        settings = {"dataset": items, "embedding_column": "vector", "key_column": "item"}
        if "quantizer" not in flags:
            settings |= {"codebook_size": 16, "max_steps": 20}
        words = []
        for name, value in {**settings, "output_dir": out, **flags}.items():
            words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
        main(words)
        return Path(out)

    return run


def read(folder: Path, name: str = "ids.parquet") -> dict:
    """Ids by key, in the order of the file."""
    table = pq.read_table(folder / name)
    return dict(zip(table["key"].to_pylist(), map(tuple, table["codes"].to_pylist())))


@pytest.fixture
def read_ids():
    return read


@pytest.fixture
def make_rows(tmp_path):
    """make_rows(vectors, keys) is a Parquet file of them."""
    made = []

    def make(vectors, keys) -> Path:
        made.append(tmp_path / f"rows-{len(made)}.parquet")
        return write_rows(made[-1], vectors, keys)

    return make


@pytest.fixture
def make_clusters():
    return clusters


@pytest.fixture
def contents():
    """contents(folder): the bytes of what `optvq ids` writes, but of the picture."""
    names = ["README.md", "config.json", "ids.parquet", "model.safetensors", "report.json"]
    return lambda folder: {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="session")
def given(tmp_path_factory, items):
    """Unique ids of the first run, which others are compared with."""
    folder = tmp_path_factory.mktemp("given") / "out"
    flags = {"--dataset": items, "--embedding-column": "vector", "--key-column": "item", "--codebook-size": 16}
    words = [str(word) for pair in {**flags, "--max-steps": 20, "--output-dir": folder}.items() for word in pair]
    main([*words, "--unique"])
    return folder
