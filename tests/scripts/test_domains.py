"""Examples of other domains than images: speech, sentences, the next sentence; and the tables of docs/domains.md."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from torch import nn
from torch.nn import functional as F

from optvq_hf import QuantizerOutput


REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "scripts" / "examples"
NAMES = ("speech_codes", "semantic_ids", "next_sentence")


@pytest.fixture
def example(monkeypatch):
    """example(name).NAME is what the program defines."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield lambda name: SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))
    for name in ("rival_quantizers", "semantic_ids"):
        sys.modules.pop(name, None)


def voice(seconds: float, pitch: float, rate: int = 8000) -> np.ndarray:
    """Harmonics of a pitch that glides, louder and softer in turn: (N,) in [-1, 1]."""
    time = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * pitch * (time + 0.1 * time**2)
    harmonics = sum(np.sin(number * phase) / number for number in range(1, 9))
    return 0.2 * harmonics * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time))


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    for number in range(20):
        path = folder / ("low" if number < 10 else "high") / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = voice(0.4 + 0.03 * number, 90 + 12 * number)
        wavfile.write(path, 8000, (32767 * samples).astype(np.int16))
    return folder


# ---- speech


@pytest.mark.parametrize("dtype", (np.uint8, np.int16, np.int32, np.float32))
def test_waves_of_any_kind_are_read_alike(example, tmp_path, dtype):
    samples = voice(0.5, 200, 16000)
    if dtype == np.uint8:
        stored = np.round(128 + 127 * samples)
    else:
        stored = samples if dtype == np.float32 else samples * np.iinfo(dtype).max
    wavfile.write(tmp_path / "mono.wav", 16000, stored.astype(dtype))
    wavfile.write(tmp_path / "stereo.wav", 16000, np.stack([stored, stored], axis=1).astype(dtype))
    read_wave = example("speech_codes").read_wave
    expected = torch.from_numpy(samples).float()
    for name in ("mono.wav", "stereo.wav"):
        assert torch.allclose(read_wave(tmp_path / name, 16000), expected, atol=0.02)
    halved = read_wave(tmp_path / "mono.wav", 8000)
    assert torch.allclose(halved[50:-50], expected[::2][50:-50], atol=0.03)


def test_waves_of_mel_frames_have_these_frames(example):
    mel = example("speech_codes").Mel(8000)
    frames = mel.frames(torch.from_numpy(voice(1.0, 150)).float())
    assert frames.shape == (101, 64)

    def distance(wave):
        return (mel.frames(wave) - frames).square().mean(1).sqrt()[5:-5].mean() * 10 / np.log(10)

    assert distance(mel.wave(frames)) < 3 < distance(mel.wave(frames, iterations=0))


@pytest.mark.parametrize("length", (40, 41))
def test_padding_changes_no_frame(example, length):
    speech, generator = example("speech_codes"), torch.manual_seed(0)
    quantizer = speech.make_quantizer("transport", 2, 8, dim=32)
    codec = speech.SpeechCodec(6, quantizer).eval()
    clips = [torch.randn(length, 6, generator=generator), torch.randn(70, 6, generator=generator)]
    frames, mask = speech.pad(clips)
    together, codes, _ = codec(frames.masked_fill(~mask[..., None], 1e3), mask)
    alone, of_one, _ = codec(clips[0][None], torch.ones(1, length, dtype=torch.bool))
    tokens = (length + 1) // 2
    assert alone.shape == (1, length, 6) and of_one.shape == (1, tokens, 2)
    assert torch.allclose(together[0, :length], alone[0], atol=1e-5)
    assert torch.equal(codes[0, :tokens], of_one[0]) and (codes[0, tokens:] == -1).all()


def test_masks_of_the_library_mean_the_same(example):
    quantizer = example("speech_codes").make_quantizer("restarts", 2, 8, dim=4)
    mask = torch.arange(30) < torch.tensor([[30], [20]])
    output = quantizer(torch.randn(2, 30, 4, generator=torch.manual_seed(0)), mask=mask)
    assert output.codes.shape == (2, 30, 2) and (output.codes[mask] >= 0).all()
    assert not output.quantized[~mask].any() and output.quantized[mask].any()
    vectors = torch.randn(30, 4)
    assert quantizer(vectors).codes.shape == (30, 2) and quantizer(vectors).quantized.shape == (30, 4)


def test_speech_in_one_command(example, recordings, tmp_path, capsys):
    """The codec does better than the mean frame would, and writes what it makes of clips that it has not learned from."""
    speech, out = example("speech_codes"), tmp_path / "out"
    flags = ["--audio", str(recordings), "--output-dir", str(out), "--levels", "2", "--codebook-size", "8"]
    rivals = ["--rivals", "transport_ema", "nearest"]
    runs = speech.main([*flags, *rivals, "--max-steps", "50", "--batch-size", "6", "--samples", "2"])
    data = speech.Speech(recordings, speech.Mel(8000))
    assert (len(data.train), len(data.test)) == (18, 2)
    mean_frame = torch.cat([data.distance(torch.zeros_like(clip), clip) for clip in data.test]).mean().item()
    assert [run["rival"] for run in runs] == rivals[1:]
    assert sum(runs[0]["usage_percent"]) > sum(runs[1]["usage_percent"])
    assert all(run["unquantized_db"] > 0 and run["distance_db"] < 0.9 * mean_frame for run in runs)
    rate, samples = wavfile.read(out / "transport_ema-random-0" / "1-reconstruction.wav")
    original = wavfile.read(out / "transport_ema-random-0" / "1-original.wav")[1]
    assert rate == 8000 and samples.shape == original.shape and np.abs(samples).max() > 1000
    assert (out / "transport_ema-random-0" / "spectrograms.png").stat().st_size > 10_000
    results = json.loads((out / "results.json").read_text())
    assert results["runs"] == runs and speech.table(runs, speech.COLUMNS) in capsys.readouterr().out


def test_a_folder_without_recordings(example, tmp_path):
    with pytest.raises(SystemExit, match="0 clips to learn from and 0 to test"):
        example("speech_codes").main(["--audio", str(tmp_path)])


# ---- sentences


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package, installed: what its tests say is not read, nor are short sentences and code."""
    folder = tmp_path / "site" / "documented"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(
        '"""Short one. A sentence that has six words. Another one that is also long.\n\nThe end of it all, here."""'
    )
    (folder / "more.py").write_text(
        'def f():\n    """a sentence that has six words!\n\n    >>> f() is not one of those sentences\n    """\n\n'
        "class C:\n    x = 1\n\n    def undocumented(self):\n        pass\n"
    )
    (folder / "tests" / "test.py").write_text('"""This is not read at all, ever."""')
    monkeypatch.syspath_prepend(str(folder.parent))


def test_sentences_of_docstrings(example, package):
    first = ["A sentence that has six words.", "Another one that is also long.", "The end of it all, here."]
    assert example("semantic_ids").read_documents(["documented"]) == [first, first[:1]]


@pytest.mark.parametrize("name", ("no_such_package", "no_such_package.part", "documented.more.part", ""))
def test_packages_that_are_not_there(example, package, name):
    with pytest.raises(SystemExit, match=f"^no package '{name}' is installed$"):
        example("semantic_ids").read_documents([name])


def test_modules_and_packages_of_any_kind(example, package, tmp_path):
    """Of a module of one file, its neighbours are not read; a namespace package has no file of its own."""
    site, read = tmp_path / "site", example("semantic_ids").read_documents
    (site / "alone.py").write_text('"""A module of a single file, alone."""')
    (site / "spread" / "part").mkdir(parents=True)
    (site / "spread" / "part" / "some.py").write_text('"""Part of a package in several places."""')
    assert read(["alone"]) == [["A module of a single file, alone."]]
    assert read(["spread"]) == [["Part of a package in several places."]]
    assert read(["documented.more"]) == [["a sentence that has six words!"]]
    assert read(["documented", "alone"])[2:] == read(["alone"])
    with pytest.raises(SystemExit, match="^package 'sys' has no source in Python to read$"):
        read(["sys"])


def test_embeddings_know_words(example):
    texts = [
        "the cat sat on the mat",
        "a cat on a mat sat",
        "prices of shares fell today",
        "today share prices fell",
    ] * 2
    embeddings = example("semantic_ids").embed(texts, None, dim=2)
    assert embeddings.shape == (8, 2) and torch.allclose(embeddings.square().mean(1), torch.ones(8))
    similar = F.cosine_similarity(embeddings[:1], embeddings[1:4])
    assert similar[0] > 0.8 > similar[1:].max()


def test_embeddings_of_a_model_by_its_name(example, monkeypatch):
    """sentence-transformers is no dependency; its model's vectors get the length of others."""
    encoded = np.array([[3.0, 4.0], [0.0, 0.1]])
    stand_in = SimpleNamespace(
        SentenceTransformer=lambda name: SimpleNamespace(encode=lambda texts, **_: encoded * len(name))
    )
    monkeypatch.setitem(sys.modules, "sentence_transformers", stand_in)
    embeddings = example("semantic_ids").embed(["one", "two"], "some/model")
    assert torch.allclose(embeddings, 2**0.5 * torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


class Known(nn.Module):
    """Quantizes each vector to itself, or all to their mean."""

    def __init__(self, exact: bool):
        super().__init__()
        self.exact = exact

    def forward(self, vectors):
        if self.exact:
            numbers = torch.arange(len(vectors))
            return QuantizerOutput(vectors, torch.stack([numbers // 8, numbers % 8], dim=1), None, None, {})
        return QuantizerOutput(
            vectors.mean(0).expand_as(vectors), torch.zeros(len(vectors), 2, dtype=torch.long), None, None, {}
        )


def test_what_is_measured_of_ids(example):
    module, vectors = example("semantic_ids"), torch.randn(64, 4, generator=torch.manual_seed(0))
    of_all, settings = torch.arange(64), SimpleNamespace(codebook_size=8)
    exact, nothing = (module.measure(Known(exact), vectors, of_all, settings)[1] for exact in (True, False))
    assert exact["usage_percent"] == [100, 100] and nothing["usage_percent"] == [12.5, 12.5]
    assert exact["error_percent"] == 0 and nothing["error_percent"] == pytest.approx(100)
    assert exact["recall_percent"] == pytest.approx(100) and nothing["recall_percent"] < 40
    assert (exact["shared_percent"], exact["largest_group"]) == (0, 1)
    assert (nothing["shared_percent"], nothing["largest_group"]) == (100, 64)


# ---- the next sentence


def test_ids_are_unique_and_the_tree_has_them_all(example):
    codes = torch.tensor([[0, 1], [2, 1], [0, 1], [0, 3], [0, 1]])
    ids = example("next_sentence").Ids(codes, codebook_size=4)
    assert ids.tokens.tolist() == [[0, 5, 8], [2, 5, 8], [0, 5, 9], [0, 7, 8], [0, 5, 10]]
    assert (ids.begin, ids.vocab_size) == (11, 12)
    assert ids.following == {(): [0, 2], (0,): [5, 7], (2,): [5], (0, 5): [8, 9, 10], (0, 7): [8], (2, 5): [8]}
    assert ids.prompt([3, 0]).tolist() == [11, 0, 7, 8, 0, 5, 8]


def test_the_next_item_is_learned_and_only_items_are_recommended(example):
    """Twelve items in a circle. An untrained model recommends items too, all different."""
    module = example("next_sentence")
    ids = module.Ids(torch.stack([torch.arange(12) // 4, torch.arange(12) // 2 % 2], dim=1), codebook_size=4)
    circle = [[number, (number + 1) % 12, (number + 2) % 12] for number in range(12)]
    sizes = {"hidden_size": 32, "num_layers": 1, "context": 2, "model_batch_size": 12}
    untrained = module.train_model(ids, circle, SimpleNamespace(**sizes, model_steps=1), seed=0)
    found = module.recommend(untrained, ids, [[0, 1], [5, 6]], number=12)
    assert [sorted(items) for items in found] == [list(range(12))] * 2
    trained = module.train_model(ids, circle, SimpleNamespace(**sizes, model_steps=300), seed=0)
    before, after = (module.count_hits(model, ids, circle, seen=set(range(6))) for model in (untrained, trained))
    assert before["hits_at_1"] < 50 and before["unseen_tests"] == 6
    assert (after["hits_at_1"], after["hits_at_10"], after["unseen_hits_at_10"]) == (100, 100, 100)


def test_windows_of_documents(example):
    assert example("next_sentence").windows([[1, 2, 3, 4], [5]], context=2) == [[1, 2], [1, 2, 3], [2, 3, 4]]


def test_sentences_alone_in_their_document_are_not_seen(example):
    documents = [[0, 1], [1, 2], [3], *([[4, 5]] * 7), [6, 3]]
    sequences, tests, seen = example("next_sentence").hold_out(documents, context=2)
    assert (sequences, tests, seen) == ([[1, 2], *([[4, 5]] * 7)], [[0, 1], [6, 3]], {1, 2, 4, 5})


@pytest.mark.long
@pytest.mark.parametrize("name", ("semantic_ids", "next_sentence"))
def test_sentences_in_one_command(example, tmp_path, capsys, name):
    """With the documentation of a small package that is always there."""
    module, sizes = example(name), ["--levels", "2", "--codebook-size", "8", "--max-steps", "60", "--batch-size", "128"]
    more = ["--model-steps", "30", "--hidden-size", "16", "--num-layers", "1", "--tests", "20"]
    drawn = ["drawn"] if name == "next_sentence" else []
    starts = ["--starts", "random", "kmeans", "--rivals", "transport_ema", "restarts", *drawn]
    flags = [*sizes, "--packages", "tqdm", "--output-dir", str(tmp_path), *starts]
    runs = module.main([*flags, *(more if drawn else [])])
    kinds = [(run["rival"], run["start"]) for run in runs]
    expected = [("transport_ema", "random"), ("restarts", "own"), *((rival, "none") for rival in drawn)]
    assert kinds == [*expected, ("transport_ema", "kmeans")]
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == runs
    printed = capsys.readouterr().out
    assert module.table(runs, module.COLUMNS) in printed
    if name == "semantic_ids":
        assert all(run["usage_percent"] == [100, 100] and run["error_percent"] < 90 for run in runs)
        rows = map(json.loads, (tmp_path / "transport_ema-random-0.jsonl").read_text().splitlines())
        assert any(f"    {row['codes'][0]}-{row['codes'][1]}  {row['sentence'][:90]}" in printed for row in rows)


def test_an_interrupted_command_resumes(example, tmp_path):
    """Runs that are there are kept; with other settings they would be mixed up."""
    module, out = example("semantic_ids"), tmp_path / "out"
    few = ["--levels", "1", "--codebook-size", "2", "--max-steps", "1", "--output-dir", str(out)]
    made = {"rival": "nearest", "start": "random", "seed": 0}
    arguments = module.make_parser().parse_args([*few, "--rivals", "nearest"])
    module.save_run(arguments, [], made)
    of_both = module.make_parser().parse_args([*few, "--rivals", "nearest", "restarts", "--seeds", "0", "1"])
    earlier = module.earlier_runs(of_both)
    [settings] = [run.pop("settings") for run in earlier]
    assert earlier == [made] and (settings["max_steps"], settings["packages"]) == (1, ["sklearn"])
    left = [(0, "restarts", "own"), (1, "nearest", "random"), (1, "restarts", "own")]
    assert module.list_runs(of_both, earlier) == left
    of_both.max_steps = 2
    with pytest.raises(SystemExit, match="results.json was made with other max_steps; take another --output-dir"):
        module.earlier_runs(of_both)


def test_results_of_an_interrupted_write_are_the_earlier_ones(example, tmp_path, monkeypatch):
    module, runs = example("semantic_ids"), []
    arguments = module.make_parser().parse_args(["--output-dir", str(tmp_path)])
    module.save_run(arguments, runs, {"rival": "nearest", "start": "random", "seed": 0}, sentences=7)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        module.save_run(arguments, runs, {"rival": "nearest", "start": "random", "seed": 1}, sentences=7)
    assert json.loads((tmp_path / "results.json").read_text()) == {"sentences": 7, "runs": runs[:1]}


def test_runs_keep_the_settings_of_the_command_that_made_them(example, tmp_path):
    """Two commands add to one file, in which earlier versions told settings once."""
    module, keys = example("semantic_ids"), {"rivals", "starts", "seeds", "output_dir"}
    parse, path = module.make_parser().parse_args, tmp_path / "results.json"
    first = parse(["--output-dir", str(tmp_path), "--rivals", "transport", "nearest"])
    settings = {key: value for key, value in vars(first).items() if key not in keys}
    run = {"rival": "nearest", "start": "random", "seed": 0}
    path.write_text(json.dumps({"settings": settings | {"rivals": ["nearest"]}, "runs": [run]}))
    second = parse(["--output-dir", str(tmp_path), "--rivals", "nearest", "--starts", "kmeans"])
    module.save_run(second, module.earlier_runs(second), run | {"start": "kmeans"})
    results = json.loads(path.read_text())
    assert results == {"runs": [run | {"start": start, "settings": settings} for start in ("random", "kmeans")]}


def test_a_resumed_command_shows_what_stands_under_codes(example, tmp_path):
    """From the ids that the first of its runs has written, whoever made it."""
    module = example("semantic_ids")
    sentences = [f"{kind} number {number}" for kind in ("cats", "dogs") for number in "abc"]
    rows = [{"sentence": text, "codes": [text[0] == "d", number % 3]} for number, text in enumerate(sentences)]
    lines = "".join(json.dumps(row | {"codes": list(map(int, row["codes"]))}) + "\n" for row in rows)
    (tmp_path / "nearest-kmeans-3.jsonl").write_text(lines)
    flags = ["--output-dir", str(tmp_path), "--starts", "kmeans", "--seeds", "3", "0", "--rivals"]
    shown = module.show_first(module.make_parser().parse_args([*flags, "nearest", "transport"]))
    assert shown.startswith("What stands under some first codes (nearest, kmeans, seed 3):\n")
    assert re.search(r"^0: 3 sentences, cats.*\n    0-0  cats number a\n", shown, re.MULTILINE)
    missing = module.show_first(module.make_parser().parse_args([*flags, "restarts"]))
    assert missing == f"no {tmp_path / 'restarts-own-3.jsonl'}: what stands under its codes is not shown"


def test_prefixes_of_few_codes(example):
    """A single level; a first code with fewer second codes than are shown, or that is the only one in use."""
    show, sentences = example("semantic_ids").show_prefixes, ["a cat sat", "a cat ran", "the dog ran"]
    assert show(sentences, torch.tensor([[1], [1], [0]])) == "1: 2 sentences, cat, sat, dog, ran\n    1  a cat sat"
    assert show(sentences, torch.tensor([[1, 7], [1, 7], [0, 2]])).endswith("\n    1-7  a cat sat")
    assert show(sentences, torch.full((3, 2), 9)).splitlines()[1:] == ["    9-9  a cat sat"]


# ---- the page


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_the_page_make_the_runs_of_its_results(example, name):
    """All of them, in their order and with their settings, and no others; a command makes no run again."""
    module, page = example(name), (REPOSITORY / "docs" / "domains.md").read_text().replace("\\\n", "")
    results = json.loads((REPOSITORY / "docs" / "results" / "domains" / f"{name}.json").read_text())
    expected = []
    for flags in re.findall(rf"^python scripts/examples/{name}.py(.*)$", page, re.MULTILINE):
        arguments = module.make_parser().parse_args(shlex.split(flags))
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        for key in ("rivals", "starts", "seeds", "output_dir"):
            del settings[key]
        runs = module.list_runs(arguments, expected)
        expected += [dict(zip(("seed", "rival", "start"), run)) | {"settings": settings} for run in runs]
    keys = ("seed", "rival", "start", "settings")
    assert [{key: run[key] for key in keys} for run in results["runs"]] == expected


def test_the_page_counts_tests_of_sentences_never_seen():
    results = json.loads((REPOSITORY / "docs" / "results" / "domains" / "next_sentence.json").read_text())
    [(tests, unseen)] = {(run["tests"], run["unseen_tests"]) for run in results["runs"]}
    page = " ".join((REPOSITORY / "docs" / "domains.md").read_text().split())
    assert f"Of the {tests} tests, {unseen} ask for a sentence that is in no training sequence." in page


def test_tables_have_means_and_ranges(example):
    runs = [
        {"rival": "nearest_ema", "start": "random", "seed": seed, "usage": [100.0, 50.0 + seed], "error": error}
        for seed, error in ((0, 1.0), (1, 2.0))
    ]
    lines = example("speech_codes").table(runs, {"usage": "usage, %", "error": "error"}).splitlines()
    assert lines[0] == "| training | start | seeds | usage, % | error |"
    assert lines[2] == "| nearest, EMA | random | 2 | 100, 50.5 (50 to 51) | 1.5 (1 to 2) |"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_tables_of_its_results(example, name):
    results = json.loads((REPOSITORY / "docs" / "results" / "domains" / f"{name}.json").read_text())
    module = example(name)
    assert module.table(results["runs"], module.COLUMNS) in (REPOSITORY / "docs" / "domains.md").read_text()
