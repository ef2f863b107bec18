"""`optvq ids`: what it refuses, in one line each."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from optvq_hf import ResidualOptVQQuantizer


FILES = ["README.md", "config.json", "ids.parquet", "model.safetensors", "report.json", "report.png"]


def fails(capsys):
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("optvq ids: error: ")]
    return line


def normal_rows(rows, dim=4):
    return np.random.default_rng(0).standard_normal((rows, dim))


WRONG_ROWS = {
    "row 3 (key 3) has NaN, infinite or missing numbers": ([[1.0], [2.0], [3.0], [np.nan]], range(4)),
    "row 0 (key 0) has NaN, infinite or missing": ([[1e300], [2.0]], range(2)),
    "row 1 (key 1) has NaN, infinite or missing": ([[1.0], [None]], range(2)),
    "row 1 of column 'vector' has 2 numbers, the rows before it 1": ([[1.0], [2.0, 3.0]], range(2)),
    "row 0 of column 'vector' has 0 numbers": ([pa.scalar([], pa.list_(pa.float32()))], range(1)),
    "row 1 has no embedding in column 'vector'": ([[1.0], None], range(2)),
    "column 'vector' holds string, embeddings must be lists of numbers": (["a", "b"], range(2)),
    "column 'vector' holds list<item: string>": ([["a"], ["b"]], range(2)),
    "key 'a' comes twice": ([[1.0], [2.0], [3.0]], ["a", "b", "a"]),
    "row 1 has no key in column 'item'": ([[1.0], [2.0]], [1, None]),
    "column 'item' holds double, keys must be integers or text": ([[1.0], [2.0]], [0.5, 1.5]),
    "the largest number of the embeddings is 9.9e-20, and must be between 1e-12 and 1e+12": (
        np.full((20, 2), 9.9e-20),
        range(20),
    ),
    "column 'item' has keys beyond 64-bit signed integers: write": ([[1.0]], pa.array([2**63], pa.uint64())),
    "15 items are fewer than the 16 codes: lower --codebook-size": (normal_rows(15), range(15)),
}


@pytest.mark.parametrize("message", WRONG_ROWS)
def test_rows_that_cannot_be_used(ids, tmp_path, make_rows, capsys, message):
    with pytest.raises(SystemExit) as stop:
        ids(tmp_path / "out", dataset=make_rows(*WRONG_ROWS[message]))
    assert stop.value.code == 1
    assert message in fails(capsys)
    assert not (tmp_path / "out").exists()


def test_no_rows(ids, tmp_path, capsys):
    kinds = pa.schema({"item": pa.int64(), "vector": pa.list_(pa.float32())})
    pq.write_table(kinds.empty_table(), tmp_path / "rows.parquet")
    np.save(tmp_path / "rows.npy", np.zeros((0, 4)))
    of_array = {"dataset": tmp_path / "rows.npy", "embedding_column": None, "key_column": None}
    empty = {"dataset": tmp_path / "rows.parquet"}
    for flags in (of_array, empty, {**empty, "streaming": "true"}):
        with pytest.raises(SystemExit):
            ids(tmp_path / "out", **flags)
        assert f"dataset '{flags['dataset']}' has no rows" in fails(capsys)


def write_files(folder):
    np.save(folder / "objects.npy", np.array([[1], "a"], dtype=object), allow_pickle=True)
    np.save(folder / "flat.npy", np.zeros(8))
    np.save(folder / "empty.npy", np.zeros((8, 0)))
    np.save(folder / "text.npy", np.array([["a", "b"]]))
    (folder / "broken.npy").write_bytes(b"nothing")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    save_file(
        {
            "vector": torch.zeros(4, 2),
            "item": torch.zeros(3),
            "flat": torch.zeros(4),
            "complex": torch.zeros(4, 2, dtype=torch.complex64),
        },
        folder / "rows.safetensors",
    )
    (folder / "rows.csv").write_text("a,b\n")


WRONG_FILES = {
    "objects.npy is no .npy file of numbers: Object arrays": {"dataset": "objects.npy"},
    "flat.npy has float64, shape (8,), embeddings must be numbers of shape (N, d)": {"dataset": "flat.npy"},
    "text.npy has <U1, shape (1, 2)": {"dataset": "text.npy"},
    "empty.npy has float64, shape (8, 0), embeddings must be numbers of shape (N, d), d at least 1": {
        "dataset": "empty.npy"
    },
    "broken.npy is no .npy file": {"dataset": "broken.npy"},
    "missing.npy": {"dataset": "missing.npy"},
    "broken.safetensors is no .safetensors file": {"dataset": "broken.safetensors"},
    "missing.safetensors": {"dataset": "missing.safetensors"},
    "has no tensor 'x'; its tensors are ['complex', 'flat', 'item', 'vector']": {
        "dataset": "rows.safetensors",
        "key_column": "x",
    },
    "tensor 'item' has F32, shape (3,), keys must be 4 integers": {"dataset": "rows.safetensors"},
    "tensor 'complex' has C64, shape (4, 2), embeddings must be numbers": {
        "dataset": "rows.safetensors",
        "embedding_column": "complex",
    },
    "tensor 'flat' has F32, shape (4,)": {"dataset": "rows.safetensors", "embedding_column": "flat"},
    "no file matches": {"dataset": "missing.parquet"},
    "rows.csv": {"dataset": "rows.csv"},
    "neither a folder that exists, nor a Hub id": {"quantizer": "a/b/c"},
    "has no quantizer of `optvq ids`: it lacks config.json": {"quantizer": "."},
}


@pytest.mark.parametrize("message", WRONG_FILES)
def test_files_that_cannot_be_used(ids, tmp_path, capsys, monkeypatch, message):
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = dict(WRONG_FILES[message])
    if flags.get("dataset", "").endswith(".npy"):
        flags |= {"embedding_column": None, "key_column": None}
    with pytest.raises(SystemExit) as stop:
        ids(tmp_path / "out", **flags)
    assert stop.value.code == 1 and message in fails(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"embedding_column": "e"}, "no column 'e'; its columns are ['item', 'vector']"),
        ({"key_column": "k", "streaming": "true"}, "no column 'k'"),
        (
            {"num_quantizers": 2, "unique": "true"},
            "--unique asks for 600 ids, but levels of 16, 16 codes have only 256",
        ),
        ({"split": "test"}, "split 'test'"),
    ],
)
def test_what_cannot_be_done_is_one_line(ids, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        ids(tmp_path / "out", **flags)
    assert stop.value.code == 1 and message in fails(capsys)


def test_earlier_ids_that_do_not_allow_it(given, ids, tmp_path, capsys, make_rows):
    plain, later = ids(tmp_path / "plain"), make_rows(normal_rows(3, 8), ["x", "y", "z"])
    assert max(map(len, pq.read_table(given / "ids.parquet")["codes"].to_pylist())) == 4
    for flags, message in (
        ({"quantizer": given}, "have further codes, and those of new items could be their beginnings: pass --unique"),
        ({"quantizer": plain, "unique": "true"}, "share an id with another, and ids stay: leave --unique out"),
    ):
        with pytest.raises(SystemExit):
            ids(tmp_path / "out", dataset=later, **flags)
        assert message in fails(capsys)


def edit(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def test_folders_that_were_edited(given, ids, tmp_path, capsys, make_rows):
    def with_codes(change):
        quantizer = ResidualOptVQQuantizer.from_pretrained(given)
        for level in quantizer.levels:
            change(level.embedding.weight.data)
        return lambda folder: quantizer.save_pretrained(folder)

    def twice(folder):
        table = pq.read_table(folder / "ids.parquet")
        pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), folder / "ids.parquet")

    changes = {
        "its weights are not those of report.json": with_codes(lambda codes: codes.add_(1)),
        "its codes have NaN or infinite numbers": with_codes(lambda codes: codes.fill_(float("nan"))),
        "ids.parquet is missing": lambda folder: (folder / "ids.parquet").unlink(),
        "is broken": lambda folder: edit(folder, "model.safetensors", lambda content: content[:100]),
        "a key comes twice": twice,
    }
    for number, (message, change) in enumerate(changes.items()):
        folder = tmp_path / str(number)
        shutil.copytree(given, folder)
        change(folder)
        with pytest.raises(SystemExit):
            ids(
                tmp_path / "out", quantizer=folder, dataset=make_rows(normal_rows(3, 8), ["x", "y", "z"]), unique="true"
            )
        assert message in (line := fails(capsys)) and str(folder) in line


def test_quantizers_that_do_not_fit(given, ids, tmp_path, capsys, make_rows):
    narrow, numbers = make_rows(normal_rows(20), [f"a{n}" for n in range(20)]), make_rows(normal_rows(20, 8), range(20))
    for dataset, message in (
        (narrow, "is of 8 numbers in 1 heads, the embeddings have 4"),
        (numbers, "keys are int64"),
    ):
        with pytest.raises(SystemExit):
            ids(tmp_path / "out", dataset=dataset, quantizer=given)
        assert message in fails(capsys)
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, content in (("config.json", b"{}"), ("ids.parquet", b"x")):
        for file in FILES:
            (broken / file).write_bytes((given / file).read_bytes())
        (broken / name).write_bytes(content)
        with pytest.raises(SystemExit):
            ids(tmp_path / "out", quantizer=broken)
        assert "broken" in (line := fails(capsys)) and "is broken: " in line
    ids_of_others = pa.table({"key": pa.array(["a"], pa.large_string()), "codes": [[1, 2]]})
    pq.write_table(ids_of_others, broken / "ids.parquet")
    with pytest.raises(SystemExit):
        ids(tmp_path / "out", quantizer=broken)
    assert "its ids are not of levels with [16, 16, 16] codes" in fails(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset": None}, "--dataset is missing"),
        ({"output_dir": None}, "--output-dir is missing"),
        ({"embedding_column": None}, "--embedding-column is missing"),
        ({"key_column": None}, "--key-column is missing"),
        ({"dataset": "x.npy"}, "x.npy has no columns: leave --embedding-column out"),
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"epsilon": "nan"}, "epsilon must be finite and above 0"),
        ({"seed": -1}, "seed must be 0 or greater"),
        ({"quantizer": "x", "max_steps": 3}, "--quantizer excludes --max-steps"),
        ({"quantizer": "x", "seed": 0}, "--quantizer excludes --seed"),
        ({"embedding_column": "item"}, "--embedding-column and --key-column are both item: name two columns"),
        ({"dataset": "x.safetensors", "split": "test"}, "x.safetensors has no splits and is not streamed"),
        ({"quantizer": "x", "output_dir": "x"}, "--output-dir must be another folder than --quantizer"),
    ],
)
def test_wrong_arguments_are_one_line(ids, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        ids(**{"out": tmp_path, **flags})
    assert stop.value.code == 2 and message in fails(capsys)


def test_an_earlier_result_is_replaced_only_when_told(contents, given, ids, tmp_path, capsys, monkeypatch):
    out = ids(tmp_path / "out")
    before = contents(out)
    with pytest.raises(SystemExit):
        ids(out, unique="true")
    assert "out holds ids.parquet of an earlier run: pass --overwrite" in fails(capsys) and contents(out) == before

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("optvq_hf.item_ids.job.write_ids", full)
        with pytest.raises(SystemExit):
            ids(out, unique="true", overwrite="true")
    assert "out: No space left on device" in fails(capsys) and contents(out) == before
    (out / "other.txt").touch()
    ids(out, unique="true", overwrite="true")
    (out / "other.txt").unlink()
    assert contents(out) == contents(given) and sorted(path.name for path in out.iterdir()) == FILES


def test_a_folder_that_cannot_be_written(ids, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        ids(tmp_path / "file" / "out")
    assert "is not a folder" in fails(capsys)
