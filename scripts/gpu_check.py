# /// script
# requires-python = ">=3.11"
# dependencies = ["optvq_hf[train]", "pytest>=9.2", "pytest-timeout>=2.4", "pytest-xdist>=3.8"]
# [tool.uv.sources]
# optvq_hf = { path = "..", editable = true }
# ///
"""Proves the package on a GPU: the tests of tests/device, then what everything costs there, in one report.

    make gpu                                            # under 10 minutes on one GPU
    uv run scripts/gpu_check.py --quick                 # about 4 minutes
    python scripts/gpu_check.py --device cpu --quick    # the same in small sizes: whether it runs, not how fast

Writes report.json and report.md, and nothing else, to the output folder. Every part runs, whatever became of the others; the
exit status is 1 if a test or a part failed. Without a GPU it lists what it would do.
"""

import argparse
import copy
import io
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from xml.etree import ElementTree

import torch


REPOSITORY = Path(__file__).resolve().parents[1]
# Python puts this folder first on its path, where evaluate.py would hide the `evaluate` library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != REPOSITORY / "scripts"]
sys.path.append(str(REPOSITORY / "src"))

from optvq_hf import OptVQConfig, OptVQModel, OptVQQuantizer  # noqa: E402
from optvq_hf.sinkhorn import nearest_assign, sinkhorn_assign  # noqa: E402
from optvq_hf.training.optimization import make_optimizer  # noqa: E402


PACKAGES = ("torch", "triton", "torchvision", "transformers", "accelerate", "datasets", "numpy", "optvq_hf")
PAPER = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore"}
PARTS: dict[str, tuple[str, Callable]] = {}  # by title: what it does, and the function that does it

Rows = list[dict]


def part(title: str, what: str) -> Callable:
    """Registers a part of the report: a function of [`Settings`] that returns the rows of a table."""

    def register(function: Callable) -> Callable:
        PARTS[title] = (what, function)
        return function

    return register


class Settings(argparse.Namespace):
    """The command line.

    Attributes:
        device: The device.
        is_gpu: Whether sizes are those of a GPU.
        turns: Calls of which the median is taken.
        scratch: Folder for what the parts write.
        deadline: Value of the clock at which the time of the whole run is over.
    """

    device: torch.device
    quick: bool
    is_gpu: bool
    turns: int
    scratch: Path
    output_dir: Path
    deadline: float

    @property
    def left(self) -> float:
        """Seconds to the end of the run."""
        return self.deadline - time.monotonic()


# ---- tests -----------------------------------------------------------------------------------------------------------


@part("tests", "all tests of tests/device (slow ones too) on the device")
def tests(settings: Settings) -> Rows:
    junit = settings.scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", str(REPOSITORY / "tests" / "device"), f"--junit-xml={junit}", "-q"]
    command += [
        "-o",
        "junit_family=xunit1",
        "--tb=short",
        "--timeout=120",
        *([] if settings.is_gpu else ["-m", "not slow"]),
    ]
    if settings.is_gpu and has("xdist"):
        command += [f"--numprocesses={min(8, max(1, (os.cpu_count() or 2) // 2))}", "--dist=worksteal"]
    status = run(command, settings.scratch / "tests.log", settings, share=0.5, accepted=(0, 1, 2))
    rows = [row_of(case) for case in ElementTree.parse(junit).iter("testcase")]
    rows.sort(key=lambda row: ("failed", "skipped", "passed").index(row["outcome"]))
    if status == 2:
        rows.insert(0, {"test": "pytest", "outcome": "failed", "note": "interrupted: its time was over"})
    return rows


def run(command: list[str], log: Path, settings: Settings, share: float = 1.0, accepted: tuple[int, ...] = (0,)) -> int:
    """Runs a process of Python for at most a share of the time that is left, and returns its exit status.

    Raises:
        RuntimeError: For a status that is not accepted, with the end of the log.
    """
    paths = [str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OPTVQ_DEVICE": str(settings.device), "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT)
        for ending, seconds in ((signal.SIGINT, share * settings.left), (signal.SIGKILL, 30)):
            try:
                process.wait(max(seconds, 1))
                break
            except subprocess.TimeoutExpired:
                process.send_signal(ending)  # at the first, pytest reports what it has
    status = process.wait()
    if status not in accepted:
        raise RuntimeError(f"exit status {status}: {' '.join(log.read_text().splitlines()[-3:])}")
    return status


def row_of(case: ElementTree.Element) -> dict:
    """One test: its outcome, with the reason or what it measured."""
    outcome, notes = "passed", [f"{found.get('name')}: {found.get('value')}" for found in case.iter("property")]
    for kind, name in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        for found in case.findall(kind):
            outcome = name
            notes.append((found.get("message") or "").strip().splitlines()[0][:300] if found.get("message") else kind)
    seconds = round(float(case.get("time") or 0), 2)
    return {"test": case.get("name"), "outcome": outcome, "seconds": seconds, "note": "; ".join(notes)}


def has(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


# ---- training --------------------------------------------------------------------------------------------------------


@part("training", "300 steps of the quickstart recipe, with PSNR and codebook usage of the test images")
def training(settings: Settings) -> Rows:
    steps = 300 if settings.is_gpu else 12
    start = time.perf_counter()
    if has("datasets"):
        output_dir, how = settings.scratch / "run", "optvq train"
        command = [sys.executable, "-m", "optvq_hf.commands.train", "--overwrite", "--max-steps", str(steps)]
        command += ["--config", "quickstart", "--output-dir", str(output_dir), "--report-to", "none"]
        command += [] if settings.is_gpu else ["--batch-size", "8", "--eval-split", "test[:40]"]
        run(command, settings.scratch / "training.log", settings, share=0.4)
        if not (output_dir / "model.safetensors").is_file():
            raise TimeoutError("stopped, its share of the time was over: pass more --minutes")
        model = OptVQModel.from_pretrained(output_dir).to(settings.device)
    else:
        model, how = (
            train_plainly(settings, steps),
            "a plain loop over the embedded images: `datasets` is not installed",
        )
    seconds = time.perf_counter() - start
    images = embedded_images("test", 1000 if settings.is_gpu else 16).to(settings.device)
    with torch.no_grad():
        output = model.eval()(images, return_loss=True)
    error = (output.reconstruction.clamp(-1, 1) - images).div(2).square().mean(dim=(1, 2, 3))
    return [
        {
            "steps": steps,
            "how": how,
            "seconds": seconds,
            "PSNR (dB)": (-10 * error.log10()).mean().item(),
            "usage (%)": 100 * (output.code_counts > 0).double().mean().item(),
            "test images": len(images),
        }
    ]


def train_plainly(settings: Settings, steps: int) -> OptVQModel:
    """The model of the recipe, with AdamW and one cycle of the learning rate."""
    from optvq_hf.training.optimization import make_schedule

    batch_size = 64 if settings.is_gpu else 8
    torch.manual_seed(0)
    model = OptVQModel(OptVQConfig(**PLAIN, num_channels=1)).to(settings.device).train()
    optimizer = make_optimizer(model, 5e-3, 0.05, codebook=list(model.quantizer.parameters()), codebook_multiplier=2)
    schedule = make_schedule(optimizer, steps, 0.05)
    images = embedded_images("train", 4096 if settings.is_gpu else 64)
    for step, batch in enumerate(islice(cycle(images.split(batch_size)), steps)):
        model.quantizer.epsilon = 10.0 * 10 ** (step / (steps - 1))
        train_step(model, batch.to(settings.device), optimizer, None)
        schedule.step()
    return model


def embedded_images(split: str, number: int) -> torch.Tensor:
    """(number, 1, 32, 32) in [-1, 1], of the dataset in the package, read without `datasets`."""
    import numpy as np
    from PIL import Image
    from pyarrow import parquet

    path = REPOSITORY / "src" / "optvq_hf" / "data" / "fashion_mnist_sample" / f"{split}.parquet"
    images = parquet.read_table(path, columns=["image"])["image"][:number].to_pylist()
    arrays = [np.asarray(Image.open(io.BytesIO(image["bytes"])).resize((32, 32), Image.BILINEAR)) for image in images]
    return torch.from_numpy(np.stack(arrays)).float()[:, None] / 127.5 - 1


# ---- clocks ----------------------------------------------------------------------------------------------------------


def milliseconds(device: torch.device, function: Callable) -> float:
    """Of one call: between two events of the GPU, or on the clock of a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def side_by_side(device: torch.device, functions: dict[str, Callable], turns: int) -> dict[str, float]:
    """Median milliseconds of each, after one call to warm up; every turn has another order."""
    times = {name: [] for name in functions}
    shuffled = random.Random(0)
    for _ in range(turns + 1):
        for name in shuffled.sample(list(functions), len(functions)):
            times[name].append(milliseconds(device, functions[name]))
    return {name: statistics.median(of_one[1:]) for name, of_one in times.items()}


def peak_memory(device: torch.device, function: Callable) -> float | None:
    """MiB that a call takes above what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


# ---- solver and quantizer --------------------------------------------------------------------------------------------


@part("solver", "sinkhorn_assign, nearest_assign and torch.cdist + argmin at four sizes, with peak memory")
def solver(settings: Settings) -> Rows:
    cases = [(16384, 1024, 8), (16384, 4096, 4), (32768, 16384, 8), (65536, 16384, 64)]
    rows = []
    for num_rows, num_codes, width in cases if settings.is_gpu else [(512, 128, 8), (512, 256, 4)]:
        z, c = points(settings.device, num_rows, num_codes, width)
        methods = {
            "cdist + argmin": lambda z=z, c=c: torch.cdist(z, c).argmin(dim=1),
            "sinkhorn_assign, torch, nothing kept": partial(
                sinkhorn_assign, z, c, **PAPER, memory_budget=0, solver="torch"
            ),
        }
        for name in ("auto", "torch", "fused") if settings.is_gpu else ("auto", "torch"):
            methods[f"sinkhorn_assign, {name}"] = partial(sinkhorn_assign, z, c, **PAPER, solver=name)
            methods[f"nearest_assign, {name}"] = partial(nearest_assign, z, c, solver=name)
        times = side_by_side(settings.device, methods, settings.turns)
        for name, time_of_one in times.items():
            rows.append(
                {
                    "N": num_rows,
                    "K": num_codes,
                    "d": width,
                    "method": name,
                    "ms": time_of_one,
                    "to cdist + argmin": time_of_one / times["cdist + argmin"],
                    "peak memory (MiB)": peak_memory(settings.device, methods[name]),
                }
            )
    return rows


def points(device: torch.device, num_rows: int, num_codes: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features, codebook = (torch.randn(number, width, generator=generator) for number in (num_rows, num_codes))
    return features.to(device), codebook.to(device)


@part("quantizer", "a training step of the quantizer (forward, backward, AdamW) with each assignment")
def quantizer(settings: Settings) -> Rows:
    shape = (64, 256, 16, 16) if settings.is_gpu else (4, 32, 8, 8)
    num_codes = 16384 if settings.is_gpu else 256
    features = torch.randn(shape, device=settings.device)
    steps = {}
    for assignment in ("nearest", "sinkhorn", "sample"):
        for warm_start in (False, True) if assignment == "sinkhorn" else (False,):
            module = OptVQQuantizer(
                num_codes, shape[1], num_heads=4, training_assignment=assignment, warm_start=warm_start
            ).to(settings.device)
            optimizer = make_optimizer(module, 1e-4, 0.0)
            name = f"{assignment}{', warm start' if warm_start else ''}"
            steps[name] = partial(train_step, module, features, optimizer, None)
    times = side_by_side(settings.device, steps, settings.turns)
    return [
        {
            "assignment": name,
            "input": " x ".join(map(str, shape)),
            "codes": num_codes,
            "ms": ms,
            "peak memory (MiB)": peak_memory(settings.device, steps[name]),
        }
        for name, ms in times.items()
    ]


def train_step(
    module: torch.nn.Module, inputs: torch.Tensor, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None
) -> None:
    """Forward, backward and update, under autocast to `dtype` unless it is None."""
    with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype is not None):
        output = module(inputs)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- models ----------------------------------------------------------------------------------------------------------

PLAIN = {"backbone": "plain_cnn", "image_size": 32, "codebook_size": 1024, "codebook_dim": 8, "num_codebook_heads": 4}
SMALL = {"image_size": 16, "base_channels": 32, "channel_multiplier": (1, 2), "num_res_blocks": 1, "codebook_size": 64}
VARIANTS = {  # dtype of autocast, memory format, whether products are TF32
    "float32": (None, torch.contiguous_format, "ieee"),
    "TF32": (None, torch.contiguous_format, "tf32"),
    "bf16 autocast": (torch.bfloat16, torch.contiguous_format, "ieee"),
    "bf16 autocast, channels_last": (torch.bfloat16, torch.channels_last, "ieee"),
}


def models(settings: Settings) -> dict[str, tuple[OptVQConfig, int]]:
    """Configuration and batch size of each."""
    if not settings.is_gpu:
        small = {**SMALL, "latent_channels": 32, "codebook_dim": 32}
        return {"VQGAN 16 px": (OptVQConfig(**small), 2), "plain CNN 32 px": (OptVQConfig(**PLAIN), 2)}
    return {"VQGAN 256 px": (OptVQConfig(), 16), "plain CNN 32 px": (OptVQConfig(**PLAIN), 256)}


def make_step(settings: Settings, config: OptVQConfig, batch_size: int, variant: str, compiled: bool) -> Callable:
    dtype, memory_format, precision = VARIANTS[variant]
    torch.manual_seed(0)
    model = OptVQModel(config).to(settings.device, memory_format=memory_format).train()
    if compiled:
        for module in (model.encoder, model.decoder):
            module.compile(backend="inductor" if settings.is_gpu else "aot_eager")
    pixels = make_pixels(settings, config, batch_size).to(memory_format=memory_format)
    optimizer = make_optimizer(model, 1e-4, 0.05)

    def step() -> None:
        backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = precision
        try:
            train_step(model, pixels, optimizer, dtype)
        finally:
            for backend, value in zip(backends, before):
                backend.fp32_precision = value

    return step


def make_pixels(settings: Settings, config: OptVQConfig, batch_size: int) -> torch.Tensor:
    shape = (batch_size, config.num_channels, config.image_size, config.image_size)
    return torch.rand(shape, device=settings.device) * 2 - 1


def measure_steps(settings: Settings, variants: list[str], compiled: bool = False) -> Rows:
    """One row per model and variant; a variant that fails has its error."""
    rows = []
    of_models = list(reversed(models(settings).items()))  # the faster first
    for name, (config, batch_size) in of_models if settings.is_gpu or not compiled else of_models[:1]:
        for variant in variants:
            row = {"model": name, "variant": f"{variant}{', compiled' if compiled else ''}", "batch": batch_size}
            try:
                if settings.left < 0:
                    raise TimeoutError("skipped, the time is over")
                step = make_step(settings, config, batch_size, variant, compiled)
                start = time.perf_counter()
                step()
                row["first step (s)"] = time.perf_counter() - start
                [ms] = side_by_side(settings.device, {"": step}, settings.turns).values()
                row |= {"ms": ms, "images/s": 1e3 * batch_size / ms}
                row["peak memory (MiB)"] = peak_memory(settings.device, step)
            except Exception as error:
                row["error"] = one_line(error)
            rows.append(row)
    return rows


@part(
    "encoding",
    "images/s of encode in evaluation mode by batch size, in float32, under bf16 autocast, and of a model in bf16",
)
@torch.no_grad()
def encoding(settings: Settings) -> Rows:
    rows = []
    for name, (config, batch_size) in models(settings).items():
        torch.manual_seed(0)
        model = OptVQModel(config).to(settings.device).eval()
        in_bf16 = copy.deepcopy(model).to(torch.bfloat16)
        for size in (1, 8, 4 * batch_size) if settings.is_gpu else (1, batch_size):
            pixels = make_pixels(settings, config, size)

            def encode(dtype=None, model=model, pixels=pixels):
                with torch.autocast(settings.device.type, dtype=dtype, enabled=dtype is not None):
                    model.encode(pixels, return_loss=False)

            # Convolutions of torch are TF32 by default, where a GPU has that.
            functions = {"float32, TF32 convolutions": encode, "bf16 autocast": partial(encode, torch.bfloat16)}
            functions["bf16 model"] = partial(encode, model=in_bf16)
            for variant, ms in side_by_side(settings.device, functions, settings.turns).items():
                rows.append({"model": name, "variant": variant, "batch": size, "ms": ms, "images/s": 1e3 * size / ms})
    return rows


@part("model", "a training step of the default VQGAN and of the plain CNN: float32, TF32, bf16 autocast, channels_last")
def model_steps(settings: Settings) -> Rows:
    return measure_steps(settings, list(VARIANTS) if settings.is_gpu else ["float32", "bf16 autocast"])


@part("compiled model", "the training step again with encoder and decoder compiled")
def compiled_steps(settings: Settings) -> Rows:
    return measure_steps(settings, ["bf16 autocast, channels_last"] if settings.is_gpu else ["float32"], compiled=True)


# ---- the report ------------------------------------------------------------------------------------------------------


def describe(device: torch.device) -> dict:
    """Device, driver and versions."""
    found = {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    if device.type == "cuda":
        of_device = torch.cuda.get_device_properties(device)
        found["device"] = f"{of_device.name}, {of_device.total_memory / 2**30:.0f} GiB"
        found["devices"] = torch.cuda.device_count()
        found["capability"] = f"{of_device.major}.{of_device.minor}"
        found["CUDA"], found["cuDNN"] = torch.version.cuda, torch.backends.cudnn.version()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            found["driver"] = "unknown"
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def one_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"


def markdown(report: dict) -> str:
    """The report as a page."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    sections = [f"Measured by `{report['command']}`. {machine}."]
    for title, found in report["parts"].items():
        lines = [f"## {title}", f"{found['what']} ({found['seconds']:.0f} s)."]
        if "error" in found:
            lines.append(f"Failed: {found['error']}")
        rows = found.get("rows", [])
        if title == "tests":
            lines.append(f"{count(rows)}. Those that failed, were skipped, or measured something:")
            rows = [row for row in rows if row["outcome"] != "passed" or row["note"]]
        if rows:
            lines.append(table(rows))
        sections += lines
    return "\n\n".join(sections) + "\n"


def table(rows: Rows) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")

    lines = [names, ["-"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def count(rows: Rows) -> str:
    outcomes = [row["outcome"] for row in rows]
    return ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped"))


def summary(title: str, found: dict) -> str:
    """One line about a part."""
    if "error" in found:
        return f"{title}: failed: {found['error']}"
    rows = found["rows"]
    if title == "tests":
        return f"{title}: {count(rows)}"
    failed = sum("error" in row for row in rows)
    return f"{title}: {len(rows)} rows{f', {failed} of them failed' if failed else ''}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, help="Device; by default the first GPU")
    parser.add_argument("--quick", action="store_true", help="About 4 minutes instead of 9")
    parser.add_argument("--minutes", type=float, help="Parts that would begin after so many minutes are skipped")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="Parts to run; by default all")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu_check"), help="Folder of the report")
    settings = parser.parse_args(argv, namespace=Settings())
    if settings.device is None and not torch.cuda.is_available():
        print("There is no GPU here. On one, this would run:")
        for title, (what, _) in PARTS.items():
            print(f"  {title}: {what}")
        return 0
    settings.device = settings.device or torch.device("cuda")
    settings.is_gpu = settings.device.type == "cuda"
    settings.turns = (5 if settings.quick else 20) if settings.is_gpu else 1
    settings.deadline = time.monotonic() + 60 * (settings.minutes or (4 if settings.quick else 9))
    settings.output_dir = settings.output_dir.resolve()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix="gpu_check_")
    settings.scratch = Path(scratch.name)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes started in the background would ignore it

    command = " ".join(["scripts/gpu_check.py", *(sys.argv[1:] if argv is None else argv)])
    report = {"command": command, "machine": describe(settings.device), "parts": {}}
    print(json.dumps(report["machine"], indent=1), flush=True)
    for title in settings.only or PARTS:
        what, function = PARTS[title]
        found, start = {"what": what}, time.monotonic()
        try:
            if settings.left < 0:
                raise TimeoutError("skipped, the time is over")
            found["rows"] = function(settings)
        except (Exception, SystemExit) as error:
            found["error"], found["traceback"] = one_line(error), traceback.format_exc()
        found["seconds"] = time.monotonic() - start
        report["parts"][title] = found
        # After every part, so that a run that is stopped leaves a report.
        (settings.output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (settings.output_dir / "report.md").write_text(markdown(report))
        print(f"[{found['seconds']:.0f} s] {summary(title, found)}", flush=True)
        if settings.is_gpu:
            torch.cuda.empty_cache()
    print(f"\n{markdown(report)}")
    print("\n".join(summary(title, found) for title, found in report["parts"].items()))
    print(f"report: {settings.output_dir / 'report.md'}")
    return int(any(is_failure(found) for found in report["parts"].values()))


def is_failure(found: dict) -> bool:
    return "error" in found or any("error" in row or row.get("outcome") == "failed" for row in found["rows"])


if __name__ == "__main__":
    sys.exit(main())
