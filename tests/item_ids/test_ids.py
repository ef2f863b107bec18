"""`optvq ids`: what it writes, that it depends on nothing else, and later items."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from optvq_hf import ResidualOptVQQuantizer


FILES = ["README.md", "config.json", "ids.parquet", "model.safetensors", "report.json", "report.png"]


def normal_rows(rows, dim=4):
    return np.random.default_rng(0).standard_normal((rows, dim))


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


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


def test_the_bytes_depend_neither_on_order_nor_source(contents, given, ids, tmp_path, make_rows, make_clusters):
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


def test_arrays_and_tensors(contents, ids, tmp_path, make_clusters, make_rows, read_ids):
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
    first = ids(tmp_path / "1", dataset=make_rows(normal_rows(16), range(16)), unique=unique)
    assert report_of(first)["collisions"]["ids"]["colliding_items"] == 0 == report_of(first)["earlier_items"]
    second = ids(tmp_path / "2", dataset=make_rows(normal_rows(17)[16:], [16]), quantizer=first, unique=unique)
    assert len(read_ids(second)) == 1 and len(read_ids(second, "earlier_ids.parquet")) == 16


def test_collisions_are_those_with_earlier_items_too(ids, tmp_path, make_rows, read_ids):
    first = ids(tmp_path / "1", dataset=make_rows(normal_rows(40), range(40)))
    second = ids(tmp_path / "2", dataset=make_rows(normal_rows(40), range(100, 140)), quantizer=first)
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
