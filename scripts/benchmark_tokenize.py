"""Measures `optvq tokenize`: images per second beside encode alone and one image at a time, and where the time goes.

    python scripts/benchmark_tokenize.py --model model_cards/mnist --dataset ylecun/mnist --max-images 4000 --num-workers 1 \
        --output-dir runs/benchmark_tokenize

Takes the flags of `optvq tokenize`. All ways run in turn, several times, in this process, because other programs may slow
the machine down for a while; printed is the median. Not counted are imports and loading, whose seconds are printed alone.
Writes tokenization_benchmark.json into the output folder.
"""

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory


# Appended, because in first position scripts/evaluate.py would hide the library of that name.
sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import pipeline  # noqa: E402

from optvq_hf.commands.tokenize import make_parser  # noqa: E402
from optvq_hf.data.loading import decode_image  # noqa: E402
from optvq_hf.tokenization.job import TokenizationJob, tokenize_locally  # noqa: E402
from optvq_hf.tokenization.shards import write_parquet  # noqa: E402


ROUNDS = 5
# One image at a time, that takes too long for all of them.
ALONE = 300


def main(argv=None, rounds: int = ROUNDS) -> dict:
    started = time.perf_counter()
    arguments, source = make_parser().parse(argv)
    job = TokenizationJob(arguments, source)
    writer = job.writer()
    tokenizer, images, rows = writer.tokenizer, writer.source.images, writer.source.rows
    if rows is None:
        raise ValueError("measure a dataset whose length is known, without --streaming")
    loading = time.perf_counter() - started
    parts = [rows[start : start + writer.batch_size] for start in range(0, len(rows), writer.batch_size)]
    records = [images[part] for part in parts]
    prepared = [tokenizer.prepare({"index": part, **record}) for part, record in zip(parts, records)]
    pictures = [decode_image(record) for batch in records for record in batch["image"]][:ALONE]
    pipe = pipeline("image-tokenization", model=tokenizer.model, image_processor=tokenizer.image_processor)

    def command() -> int:
        shutil.rmtree(job.folder.folder, ignore_errors=True)
        (job.folder.folder / "data").mkdir(parents=True)
        job.folder.progress.mkdir()
        tokenize_locally(job, writer, 0, 1)
        return len(rows)

    @torch.inference_mode()
    def encode_alone() -> int:
        for batch in prepared:
            tokenizer.encode(batch.pixel_values)
        return len(rows)

    @torch.no_grad()
    def one_at_a_time() -> int:
        for picture in pictures:
            tokenizer.model.encode(tokenizer.image_processor(picture, return_tensors="pt").pixel_values)
        return len(pictures)

    def pipeline_of_a_list() -> int:
        pipe(pictures)
        return len(pictures)

    ways = {
        "optvq tokenize": command,
        "encode alone, tensors in memory": encode_alone,
        "one image at a time": one_at_a_time,
        "pipeline of a list": pipeline_of_a_list,
    }
    out = Path(arguments.output_dir)
    with TemporaryDirectory() as temporary:
        arguments.output_dir = f"{temporary}/tokens"
        writer.folder = job.folder
        speeds = {name: [] for name in ways}
        for way in ways.values():  # the first call of each sets up memory
            way()
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                number = way()
                speeds[name].append(number / (time.perf_counter() - start))
        seconds = time_of_parts(writer, parts, records, Path(temporary))
    report = {"images": len(rows), "threads": torch.get_num_threads(), "workers": source.num_workers}
    report |= {"seconds of loading": loading}
    report["images per second"] = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {name: [a / b for a, b in zip(speeds["optvq tokenize"], speeds[name])] for name in list(ways)[1:]}
    report["optvq tokenize, relative"] = {name: statistics.median(values) for name, values in ratios.items()}
    report["seconds in one process"] = seconds
    for title in ("images per second", "optvq tokenize, relative", "seconds in one process"):
        print(f"\n{title}")
        for name, value in report[title].items():
            print(f"  {name:34} {value:10.3f}" if value < 100 else f"  {name:34} {value:10,.0f}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenization_benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def time_of_parts(writer, parts, records, folder: Path) -> dict[str, float]:
    """Seconds of every part, one after the other, without workers."""
    seconds = dict.fromkeys(("read", "decode, resize, crop", "encode", "write"), 0.0)
    codes, columns = [], []
    for part, record in zip(parts, records):
        times = [time.perf_counter()]
        writer.source.images[part]
        times.append(time.perf_counter())
        prepared = writer.tokenizer.prepare({"index": part, **record})
        times.append(time.perf_counter())
        codes.append(writer.tokenizer.encode(prepared.pixel_values))
        times.append(time.perf_counter())
        columns.append(prepared.columns)
        for name, start, end in zip(seconds, times, times[1:]):
            seconds[name] += end - start
    start = time.perf_counter()
    joined = {name: [value for batch in columns for value in batch[name]] for name in columns[0]}
    joined["codes"] = np.concatenate(codes)
    write_parquet(folder / "part.parquet", {name: joined[name] for name in writer.features}, writer.features)
    seconds["write"] = time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    main()
