"""The training log, one JSON line per logged step, and the summary of a run."""

import json
import math
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator

from ...parsing import parse_json
from ..digests import DIGEST, log_of


LOG_FILE, RECIPE_FILE, SUMMARY_FILE = "training_log.jsonl", "recipe.yaml", "training_summary.json"


class TrainingLog:
    """The file `training_log.jsonl`, to which entries are appended.

    Args:
        folder: Where to write.
        step: Resume after this step, and keep the file's entries up to it. 0 starts a new file.
        writes: False keeps new entries in memory only, for all ranks but 0.
        earlier: Folder of the log whose entries are kept; by default the folder to write to.
    """

    def __init__(self, folder: Path, step: int = 0, writes: bool = True, earlier: Path | None = None):
        self.folder, self.writes = folder, writes
        self.entries: list[dict] = []
        path = (earlier or folder) / LOG_FILE
        if step > 0 and path.is_file():
            self.entries = [
                entry for entry in map(_parse, path.read_text().splitlines()) if entry.get("step", step + 1) <= step
            ]
        self._write()

    def _write(self) -> None:
        if self.writes:
            unfinished = self.folder / f".{LOG_FILE}"
            unfinished.write_text("".join(map(_line, self.entries)))
            unfinished.replace(self.folder / LOG_FILE)

    def add(self, entry: dict) -> None:
        """Appends one entry."""
        self.entries.append(entry)
        if self.writes:
            with open(self.folder / LOG_FILE, "a") as file:
                file.write(_line(entry))

    def finish(self, digest: str) -> None:
        """Writes the digest of the run's weights into the last entry."""
        self.entries = log_of(self.entries, digest)
        self._write()


def summarize(entries: list[dict], images_per_step: int, accelerator: Accelerator, dataset: dict) -> dict:
    """Summary of a finished run as JSON: time, device and alarms, also of runs that were resumed.

    Args:
        dataset: Entries that name the dataset.
    """
    seconds, before = 0.0, 0
    for entry in entries:
        seconds += (entry["step"] - before) * images_per_step / entry["images_per_second"]
        before = entry["step"]
    device = accelerator.device
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return {
        **dataset,
        "steps": before,
        "images_per_step": images_per_step,
        "seconds": round(seconds, 1),
        "device": f"{name}, {threads}" if device.type == "cpu" else name,
        "processes": accelerator.num_processes,
        "alarms": first_steps_of_alarms(entries),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def first_steps_of_alarms(entries: list[dict]) -> dict[str, int]:
    """The step at which each alarm was first raised, by name."""
    first: dict[str, int] = {}
    for entry in entries:
        for name in entry.get("alarms", ()):
            first.setdefault(name, entry["step"])
    return first


def _line(entry: dict) -> str:
    """An entry as a line of JSON, with null for NaN and infinity."""
    bad = {name: None for name, value in entry.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(entry | bad) + "\n"


def _parse(line: str) -> dict:
    """A line as an entry, without the digest of a run that is extended; empty for a line that a kill truncated."""
    try:
        entry = parse_json(line).items()
        return {name: math.nan if value is None else value for name, value in entry if name != DIGEST}
    except ValueError:
        return {}
