"""What must hold on a GPU: the tests of tests/device, and a training."""

import io
import os
import signal
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from xml.etree import ElementTree

import torch
from costs import PLAIN, train_step
from parts import REPOSITORY, Rows, Settings, part

from optvq_hf import OptVQConfig, OptVQModel
from optvq_hf.training.optimization import make_optimizer


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


@part("training", "300 steps of the quickstart recipe, with PSNR and codebook usage of the test images")
def training(settings: Settings) -> Rows:
    steps = 300 if settings.is_gpu else 30
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
