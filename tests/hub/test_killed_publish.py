"""Publishing that is killed: the repository has everything or nothing of it, and the same command finishes it."""

import os
import subprocess
import sys
import time
from secrets import token_hex

import numpy as np
import pytest


pytestmark = pytest.mark.hub
KILLS = int(os.environ.get("OPTVQ_KILLS", "2"))


def publish(run, repo_id) -> subprocess.Popen:
    command = [sys.executable, "-m", "optvq_hf", "publish", str(run), repo_id]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_killed_at_any_moment(hub, alice, run):
    started = time.monotonic()
    name = token_hex(4)
    whole = publish(run, f"alice/{name}")
    assert whole.wait(timeout=300) == 0, whole.stderr.read()
    seconds = time.monotonic() - started
    expected = hub.repository(f"alice/{name}").files().keys()
    for number, share in enumerate(np.linspace(0.4, 1, KILLS)):  # imports take the first part
        repo_id = f"alice/{name}-{number}"
        process = publish(run, repo_id)
        try:
            process.wait(timeout=share * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if ("model", repo_id) in hub.repositories and len(hub.repository(repo_id).commits) > 1:
            assert hub.repository(repo_id).files().keys() >= expected
        again = publish(run, repo_id)
        assert again.wait(timeout=300) == 0, again.stderr.read()
        repository = hub.repository(repo_id)
        assert len(repository.commits) == 2 and repository.files().keys() == expected
