"""`optvq ids`: what it writes, that it depends on nothing else, later items, and what it refuses."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from optvq_hf import ResidualOptVQQuantizer


FILES = ["README.md", "config.json", "ids.parquet", "model.safetensors", "report.json", "report.png"]


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES if name != "report.png"}


@pytest.fixture(scope="module")
def given(tmp_path_factory, items):
    """Unique ids of the first run, which others are compared with."""
    from optvq_hf.commands.ids import main

    folder = tmp_path_factory.mktemp("given") / "out"
    flags = {"--dataset": items, "--embedding-column": "vector", "--key-column": "item", "--codebook-size": 16}
    words = [str(word) for pair in {**flags, "--max-steps": 20, "--output-dir": folder}.items() for word in pair]
    main([*words, "--unique"])
    return folder


def test_ids_are_the_nearest_codes_of_the_saved_quantizer(ids, tmp_path, make_clusters, read_ids):
    out = ids(tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == FILES
    found = read_ids(out)
    assert list(found) == [f"i{n:03}" for n in range(600)]
    quantizer = ResidualOptVQQuantizer.from_pretrained(out)
    vectors = torch.from_numpy(make_clusters(600))
    output = quantizer(vectors, return_loss=False)
    assert [list(one) for one in found.values()] == output.codes.tolist()
    report = report_of(out)
    error = report["reconstruction_error"]
    assert error["mean_squared"][-1] == pytest.approx((vectors - output.quantized).square().mean().item(), rel=1e-4)
    share = (vectors - output.quantized).square().sum() / (vectors - vectors.mean(0)).square().sum()
    assert error["share_of_variance"][-1] == pytest.approx(share.item(), rel=1e-4) == error["share_of_variance_of_ids"]
    assert [level["usage"] for level in report["levels"]] == [100] * 3
    assert report["collisions"]["ids"]["distinct_ids"] == len(set(found.values())) < 600
    counts = np.unique([*found.values()], axis=0, return_counts=True)[1]
    assert report["collisions"]["ids"]["colliding_items"] == counts[counts > 1].sum()
    assert report["collisions"]["ids"]["largest_groups"][0] == counts.max()
    assert [prefix["distinct"] for prefix in report["prefixes"]] == [
        len({one[:levels] for one in found.values()}) for levels in (1, 2, 3)
    ]


def test_unique_ids(given, ids, tmp_path, make_clusters, read_ids):
    """All are different; only the last code of items in groups with a collision is another than the nearest."""
    plain, unique, report = read_ids(ids(tmp_path / "plain")), read_ids(given), report_of(given)
    assert len(set(unique.values())) == 600 and report["collisions"]["ids"]["colliding_items"] == 0
    assert report["collisions"]["nearest codes"] == report_of(tmp_path / "plain")["collisions"]["nearest codes"]
    groups = {}
    for key, one in plain.items():
        groups.setdefault(one[:-1], []).append(key)
    for keys in groups.values():
        collides = len({plain[key] for key in keys}) < len(keys)
        assert collides or all(unique[key] == plain[key] for key in keys)
        assert all((len(unique[key]) == 4) == (collides and len(keys) >= 16) for key in keys)
        assert all(unique[key][:2] == plain[key][:2] for key in keys)
    changed = [key for key in plain if unique[key][:3] != plain[key]]
    assert report["items_with_other_codes_than_the_nearest"] == len(changed) > 0
    quantizer = ResidualOptVQQuantizer.from_pretrained(given)
    vectors = torch.from_numpy(make_clusters(600))
    decoded = quantizer.lookup(torch.tensor([one[:3] for one in unique.values()]))
    share = (vectors - decoded).square().sum() / (vectors - vectors.mean(0)).square().sum()
    assert report["reconstruction_error"]["share_of_variance_of_ids"] == pytest.approx(share.item(), rel=1e-4)


def test_the_bytes_depend_neither_on_order_nor_source(given, ids, tmp_path, make_rows, make_clusters):
    order = np.random.default_rng(3).permutation(600)
    vectors, keys = make_clusters(600), np.array([f"i{n:03}" for n in range(600)])
    shuffled = make_rows(vectors[order].astype("f8"), keys[order])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        made = ids(tmp_path / "out", dataset=shuffled, unique="true", streaming="true")
    finally:
        torch.set_num_threads(threads)
    assert contents(made) == contents(given)


def test_arrays_and_tensors(ids, tmp_path, make_clusters, make_rows, read_ids):
    vectors, order = make_clusters(300), np.random.default_rng(0).permutation(300)
    np.save(tmp_path / "rows.npy", vectors.astype("f8"))
    save_file(
        {"a": torch.from_numpy(vectors[order]), "b": torch.from_numpy(order.astype("i4"))},
        tmp_path / "rows.safetensors",
    )
    made = [
        ids(tmp_path / "0", dataset=tmp_path / "rows.npy", embedding_column=None, key_column=None),
        ids(tmp_path / "1", dataset=tmp_path / "rows.safetensors", embedding_column="a", key_column="b"),
        ids(tmp_path / "2", dataset=make_rows(vectors, np.arange(300, dtype="u2"))),
    ]
    assert list(read_ids(made[0])) == list(range(300))
    assert contents(made[0]) == contents(made[1]) == contents(made[2])


@pytest.mark.parametrize("scale", [1e-11, 1e-3, 1e3, 1e10])
def test_the_scale_of_embeddings_does_not_matter(ids, tmp_path, make_rows, make_clusters, scale):
    made = ids(tmp_path / "out", dataset=make_rows(scale * make_clusters(600), range(600)))
    plain = ids(tmp_path / "plain", dataset=make_rows(make_clusters(600), range(600)))
    assert [level["usage"] for level in report_of(made)["levels"]] == [100] * 3
    lost = [report_of(folder)["reconstruction_error"]["share_of_variance"][-1] for folder in (made, plain)]
    assert lost[0] == pytest.approx(lost[1], rel=0.05)


def test_an_offset_of_embeddings_does_not_matter(ids, tmp_path, make_rows):
    vectors = np.random.default_rng(0).standard_normal((300, 4)) + 1e4
    error = report_of(ids(tmp_path / "out", dataset=make_rows(vectors, range(300))))["reconstruction_error"]
    assert error["share_of_variance"][-1] == pytest.approx(error["mean_squared"][-1] / vectors.var(0).mean(), rel=1e-3)


@pytest.mark.parametrize("unique", ["true", "false"])
def test_no_collisions(ids, tmp_path, make_rows, read_ids, unique):
    """As many items as codes; then one new item."""
    first = ids(tmp_path / "1", dataset=make_rows(ones(16), range(16)), unique=unique)
    assert report_of(first)["collisions"]["ids"]["colliding_items"] == 0 == report_of(first)["earlier_items"]
    second = ids(tmp_path / "2", dataset=make_rows(ones(17)[16:], [16]), quantizer=first, unique=unique)
    assert len(read_ids(second)) == 1 and len(read_ids(second, "earlier_ids.parquet")) == 16


def test_collisions_are_those_with_earlier_items_too(ids, tmp_path, make_rows, read_ids):
    first = ids(tmp_path / "1", dataset=make_rows(ones(40), range(40)))
    second = ids(tmp_path / "2", dataset=make_rows(ones(40), range(100, 140)), quantizer=first)
    assert list(read_ids(second).values()) == list(read_ids(first).values())
    found = report_of(second)["collisions"]["ids"]
    assert (found["colliding_items"], found["distinct_ids"]) == (80, len({*read_ids(first).values()}))


def test_codes_have_one_dtype(given, ids, tmp_path, make_rows, make_clusters):
    """That of all codes that there can be, whichever occur, so that files go together."""
    wide = ids(tmp_path / "1", dataset=make_rows(make_clusters(300), range(300)), codebook_size=300, num_quantizers=1)
    one = ids(tmp_path / "2", dataset=make_rows(make_clusters(1, seed=9), [900]), quantizer=wide)
    for name in ("ids.parquet", "earlier_ids.parquet"):
        assert pq.read_schema(one / name).field("codes").type.value_type == pa.uint16()


def test_transport_leaves_fewer_collisions_than_nearest_codes(tmp_path, make_clusters):
    from optvq_hf.item_ids.embeddings import Embeddings
    from optvq_hf.item_ids.job import assign
    from optvq_hf.item_ids.training import train_quantizer

    make_clusters(4000).tofile(tmp_path / "rows")
    embeddings = Embeddings(tmp_path / "rows", 8, np.arange(4000))
    different = {}
    for assignment in ("sinkhorn", "nearest"):
        settings = (3, 16, 30, 2000, 10.0, 0, torch.device("cpu"), assignment)
        codes = assign(train_quantizer(embeddings, *settings), embeddings, torch.device("cpu")).codes
        different[assignment] = len(np.unique(codes, axis=0))
    assert different["sinkhorn"] > 1.05 * different["nearest"]


def test_later_items_move_none(given, ids, tmp_path, make_rows, make_clusters, read_ids):
    """Items that have ids keep them, also with another embedding; a third run knows of the ids of both."""
    before = read_ids(given)
    keys = [*(f"i{n:03}" for n in range(590, 600)), *(f"new{n:02}" for n in range(100))]
    second = ids(tmp_path / "2", dataset=make_rows(make_clusters(110, seed=5), keys), quantizer=given, unique="true")
    now = read_ids(second)
    assert list(now) == sorted(keys) and all(now[key] == before[key] for key in keys[:10])
    assert read_ids(second, "earlier_ids.parquet") == {key: one for key, one in before.items() if key not in keys}
    report = report_of(second)
    assert (report["new_items"], report["earlier_items"], report["training"]) == (100, 600, None)
    assert (second / "model.safetensors").read_bytes() == (given / "model.safetensors").read_bytes()
    third = ids(
        tmp_path / "3",
        dataset=make_rows(make_clusters(150, seed=6), [f"z{n:03}" for n in range(150)]),
        quantizer=second,
        unique="true",
    )
    everything = before | now | read_ids(third)
    assert len(everything) == 850 == len(set(everything.values()))
    assert not {one[:-1] for one in everything.values()} & set(everything.values())
    assert len(read_ids(third, "earlier_ids.parquet")) == 700


def test_a_quantizer_without_ids(given, ids, tmp_path, read_ids):
    """As one that was pushed to the Hub alone: it gives the same ids."""
    quantizer = ResidualOptVQQuantizer.from_pretrained(given)
    quantizer.save_pretrained(tmp_path / "quantizer")
    again = ids(tmp_path / "out", quantizer=tmp_path / "quantizer", unique="true")
    assert read_ids(again) == read_ids(given) and not (again / "earlier_ids.parquet").exists()


def test_identical_embeddings(ids, tmp_path, make_rows, read_ids):
    """No spread at all, and a group larger than the codebook."""
    made = ids(tmp_path / "out", dataset=make_rows(np.ones((40, 4)), range(40)), unique="true")
    found = read_ids(made)
    assert len(set(found.values())) == 40 and {len(one) for one in found.values()} == {4}
    assert (
        report_of(made)["further_codes"] == 40 and report_of(made)["collisions"]["nearest codes"]["distinct_ids"] == 1
    )


def fails(capsys):
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("optvq ids: error: ")]
    return line


def ones(rows, dim=4):
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
    "15 items are fewer than the 16 codes: lower --codebook-size": (ones(15), range(15)),
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
    plain, later = ids(tmp_path / "plain"), make_rows(ones(3, 8), ["x", "y", "z"])
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
            ids(tmp_path / "out", quantizer=folder, dataset=make_rows(ones(3, 8), ["x", "y", "z"]), unique="true")
        assert message in (line := fails(capsys)) and str(folder) in line


def test_quantizers_that_do_not_fit(given, ids, tmp_path, capsys, make_rows):
    narrow, numbers = make_rows(ones(20), [f"a{n}" for n in range(20)]), make_rows(ones(20, 8), range(20))
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


def test_an_earlier_result_is_replaced_only_when_told(given, ids, tmp_path, capsys, monkeypatch):
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
