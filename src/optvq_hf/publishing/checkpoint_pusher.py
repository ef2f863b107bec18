"""Pushes checkpoints of a run to the Hub while the run trains."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from huggingface_hub.errors import HTTPError

from ..data.fetching import explain
from ..data.loading import hub_id
from ..training.checkpoints import LAST_CHECKPOINT, RunState, read_state, write_state
from ..training.digests import log_of
from ..training.watching.log import LOG_FILE, RECIPE_FILE
from .commits import make_repository, push_folder
from .entries import CONFIG_FILE, PROCESSOR_FILE, known_entries
from .model_card import CARD_FILE, edited_card, make_card
from .public_text import public
from .records import known_flags, read_facts, read_log
from .repository import DISCRIMINATOR_FOLDER, complete, is_ours, may_go, refuse_links


class CheckpointPusher:
    """Pushes the newest checkpoint in the background. Training does not wait for it, and continues if it fails.

    A commit holds the model of that step, ready for `from_pretrained`, and in the folder `last-checkpoint` all that
    `optvq train --resume REPO_ID` needs.

    Args:
        repo_id: Repository to push to. It is created, or write access is checked, at once, so that the Hub
            refuses before the first step.
        private: Make it private.
        output_dir: Of the run.

    Raises:
        OSError: If the Hub refuses or cannot be reached.
        ValueError: If the output folder holds an edited card, which cannot have the results of this run.
    """

    def __init__(self, repo_id: str, private: bool, output_dir: Path):
        self.repo_id = repo_id
        self._thread: Thread | None = None
        self._waiting: Path | None = None
        if edited_card(output_dir):
            raise ValueError(
                f"{output_dir / CARD_FILE} is an edited card of an earlier run: remove it for this run's card"
            )
        try:
            make_repository(repo_id, private)
        except (HTTPError, OSError, RuntimeError) as error:
            raise OSError(f"cannot push to {repo_id}: {explain(error, repo_id)}") from error

    def push(self, checkpoint: Path) -> None:
        """Starts to push. During the previous push, the newest checkpoint waits for the next call or for [`finish`]."""
        if self._thread is not None and self._thread.is_alive():
            self._waiting = checkpoint
            return
        self._waiting = None
        try:
            # The run may remove the checkpoint before it is uploaded.
            copy = TemporaryDirectory(dir=checkpoint.parent, prefix=f".{checkpoint.name}.")
            self._write(checkpoint, Path(copy.name))
        except (OSError, ValueError) as error:
            print(f"could not push {checkpoint.name}: {error}; training continues")
            return
        self._thread = Thread(target=self._send, args=(copy, checkpoint.name), daemon=True)
        self._thread.start()

    def finish(self, patience: float) -> None:
        """Waits at most `patience` seconds per push until the newest checkpoint is on the Hub."""
        for _ in range(2):
            if self._thread is not None:
                self._thread.join(patience)
                if self._thread.is_alive():
                    print(
                        f"the newest checkpoint is not on the Hub: {self.repo_id} did not answer in {patience:g} seconds"
                    )
                    return
            if self._waiting is not None:
                self.push(self._waiting)

    def _write(self, checkpoint: Path, folder: Path) -> None:
        """Writes the folder that is committed, with hard links to the checkpoint's files where the disk has them."""
        refuse_links(checkpoint.parent)
        state = read_state(checkpoint)
        for name in filter(may_go, (f"{LAST_CHECKPOINT}/{name}" for name in state.files)):
            source = checkpoint / name.removeprefix(f"{LAST_CHECKPOINT}/")
            if source.name in (CONFIG_FILE, PROCESSOR_FILE) and source.parent.name != DISCRIMINATOR_FOLDER:
                content = json.loads(source.read_text())
                if public(known_entries(source.name, content)) != content:
                    raise ValueError(
                        f"{source} holds entries that this package does not write, paths of this machine or addresses with "
                        "passwords"
                    )
            _link(source, folder / name)
            if source.parent == checkpoint:
                _link(source, folder / source.name)
        settings = known_flags(state.settings)
        write_state(folder / LAST_CHECKPOINT, RunState(**{**public(asdict(state)), "settings": settings}))
        facts = read_facts(folder)
        facts.base_model_id = hub_id(state.settings.get("model") or "")
        facts.recipe = settings if (checkpoint.parent / RECIPE_FILE).is_file() else None
        facts.log = log_of(read_log(checkpoint.parent / LOG_FILE), facts.digest)
        facts.copy_to(folder, folder)
        if facts.log:
            shutil.copy(folder / LOG_FILE, folder / LAST_CHECKPOINT)
        make_card(facts, self.repo_id.rpartition("/")[2], self.repo_id).save(folder / CARD_FILE)
        complete(folder)

    def _send(self, copy: TemporaryDirectory[str], name: str) -> None:
        with copy:
            try:
                push_folder(Path(copy.name), self.repo_id, name.capitalize().replace("-", " "), is_ours)
            except ValueError as error:
                print(f"could not push {name}: {error}; training continues")
            except (HTTPError, OSError, RuntimeError) as error:
                print(f"could not push {name}: {explain(error, self.repo_id)}; training continues")


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
