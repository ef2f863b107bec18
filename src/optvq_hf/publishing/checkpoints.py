"""Checkpoints of a run to the Hub, beside the run."""

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.errors import HTTPError

from ..data.hub_errors import explain
from ..training.history import LOG_FILE, RECIPE_FILE
from .hub import LAST_CHECKPOINT, make_repository, push_folder
from .model_card import CARD_FILE, make_card, read_facts


class CheckpointPusher:
    """Pushes the newest checkpoint in the background. Training never waits for it, and goes on if it fails.

    A commit holds the model as it is at that step, ready for `from_pretrained`, and in the folder `last-checkpoint` all that
    `optvq train --resume REPO_ID` needs.

    Args:
        repo_id: Repository to push to, which is made at once, so that a wrong token is known before the first step.
        private: Make it private.

    Raises:
        OSError: If the Hub refuses or cannot be reached.
    """

    def __init__(self, repo_id: str, private: bool):
        self.repo_id = repo_id
        self._pool = ThreadPoolExecutor(1)
        self._push: Future | None = None
        try:
            make_repository(repo_id, private)
        except (HTTPError, OSError) as error:
            raise OSError(f"cannot push to {repo_id}: {explain(error, repo_id)}") from error

    def push(self, checkpoint: Path):
        """Begins to push, unless the push before is still under way: then this checkpoint is left out."""
        if self._push is not None and not self._push.done():
            print(f"{checkpoint.name} is not pushed: the one before is still on its way")
            return
        copy = TemporaryDirectory(dir=checkpoint.parent, prefix=f".{checkpoint.name}.")  # it may be removed meanwhile
        folder = Path(copy.name)
        shutil.copytree(checkpoint, folder / LAST_CHECKPOINT, copy_function=_link)
        for path in checkpoint.iterdir():
            if path.is_file() and not path.name.startswith("training_state"):
                _link(path, folder / path.name)
        for name in (RECIPE_FILE, LOG_FILE):
            if (checkpoint.parent / name).is_file():
                shutil.copy(checkpoint.parent / name, folder)
        make_card(read_facts(folder), self.repo_id.rpartition("/")[2], self.repo_id).save(folder / CARD_FILE)
        self._push = self._pool.submit(self._send, copy, checkpoint.name)

    def finish(self):
        """Waits for the push that is under way."""
        self._pool.shutdown()

    def _send(self, copy: TemporaryDirectory, name: str):
        with copy:
            try:
                push_folder(Path(copy.name), self.repo_id, f"{name.capitalize().replace('-', ' ')}")
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                print(f"could not push {name}: {explain(error, self.repo_id)}; training goes on")


def _link(source, target):
    """A second name for the file where the disk has that, otherwise a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
