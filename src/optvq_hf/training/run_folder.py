"""An output folder: what runs have left in it, whether a run may start there, and the removal of an earlier run."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..configuration_optvq import OptVQConfig
from ..parsing import parse_json
from .checkpoints import BEST_FILE, list_checkpoints
from .watching.log import LOG_FILE, RECIPE_FILE, SUMMARY_FILE


WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PACKAGE = Path(__file__).parents[1]
# Names of the files that a run and its evaluation write to the output folder and to its folder `ema`, besides code.
FILES_OF_RUN = re.compile(
    "|".join(
        [
            r"model(-\d{5}-of-\d{5})?\.safetensors",
            r"images/step-\d+\.png",
            *map(
                re.escape,
                (
                    *("config.json", "preprocessor_config.json", INDEX_FILE),
                    *(LOG_FILE, RECIPE_FILE, SUMMARY_FILE, BEST_FILE, "training_curves.png"),
                    *("metrics.json", "reconstructions.png", "examples.png", "codebook_usage.png"),
                ),
            ),
        ]
    )
)
FOLDERS_OF_RUN = re.compile(r"(abandoned-)?checkpoint-\d+|\.checkpoint-\d+\..+|\.result\..+|tensorboard")


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a run, as earlier runs have left it."""

    path: Path

    @property
    def has_model(self) -> bool:
        """Whether it holds weights, in one file or in shards."""
        return any((self.path / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))

    @property
    def has_log(self) -> bool:
        return (self.path / LOG_FILE).is_file()

    @property
    def finished_steps(self) -> int | None:
        """Steps of the finished run whose model it holds; None if there is none."""
        try:
            steps = parse_json((self.path / SUMMARY_FILE).read_text()).get("steps")
        except (OSError, ValueError):
            return None
        return steps if self.has_model and isinstance(steps, int) else None

    def check_new_run(self) -> None:
        """Raises ValueError if it holds the model or the checkpoints of an earlier run.

        A log alone is of a run that was killed before its first checkpoint: nobody misses it.
        """
        if self.has_model:
            raise ValueError(
                f"{self.path} holds the model of an earlier run; pass --overwrite to remove that run, or another "
                "--output-dir"
            )
        if list_checkpoints(self.path):
            raise ValueError(
                f"{self.path} holds checkpoints of an earlier run; pass --resume auto to resume it, --overwrite to remove "
                "it, or another --output-dir"
            )

    def check_run_from(self, checkpoint: Path) -> None:
        """Raises ValueError if it holds anything of a run, for one that starts at a checkpoint of another folder."""
        parts = {"model": self.has_model, "checkpoints": bool(list_checkpoints(self.path)), "log": self.has_log}
        found = [name for name, is_there in parts.items() if is_there]
        if found:
            raise ValueError(
                f"{self.path} holds {' and '.join(found)} of another run than {checkpoint}: pass --overwrite to remove "
                "that run, or another --output-dir"
            )

    def check_length(self, total_steps: int) -> None:
        """Raises ValueError if it holds the result of a longer run, which a resumed run of so many steps would replace."""
        steps = self.finished_steps
        if steps is not None and total_steps < steps:
            raise ValueError(
                f"the run in {self.path} has {steps} steps already, more than the {total_steps} asked for: raise --max-steps "
                "or --num-epochs, choose another --output-dir, or --overwrite to start anew"
            )

    def remove_run(self, with_checkpoints: bool) -> None:
        """Removes what an earlier run wrote, and nothing else: it must not be mixed with the next.

        Args:
            with_checkpoints: False removes only what a run left that was killed before its first checkpoint.
        """
        if not (with_checkpoints or self.has_log):
            return
        for path in [path for part in ("", "ema") for path in _files_of_run(self.path / part)]:
            path.unlink()
        for path in self.path.iterdir():
            removable = FOLDERS_OF_RUN.fullmatch(path.name) and (with_checkpoints or path.name == "tensorboard")
            if removable and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        for folder in (self.path / "images", self.path / "ema"):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _files_of_run(folder: Path) -> Iterator[Path]:
    """The files of a run in its output folder or in `ema`. Code is a run's if it is ours to the letter, or beside our model."""
    code, is_model = _saved_code(), _is_optvq_model(folder)
    for path in filter(Path.is_file, [*folder.glob("*"), *folder.glob("images/*")]):
        name = path.relative_to(folder).as_posix()
        is_ours = name in code and (is_model or path.read_bytes() == code[name].read_bytes())
        if is_ours or FILES_OF_RUN.fullmatch(name):
            yield path


def _saved_code() -> dict[str, Path]:
    """The files of this package that `save_pretrained` copies beside a model, by name."""
    roots = [PACKAGE / "modeling_optvq.py", PACKAGE / "image_processing_optvq.py"]
    imported = [Path(path) for root in roots for path in get_relative_import_files(root)]
    return {path.name: path for path in (*roots, *imported)}


def _is_optvq_model(folder: Path) -> bool:
    try:
        return parse_json((folder / "config.json").read_text()).get("model_type") == OptVQConfig.model_type
    except (OSError, ValueError):
        return False
