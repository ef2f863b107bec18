"""One run at a time in an output folder."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch

from optvq_hf.commands.train import main
from optvq_hf.training import lock
from optvq_hf.training.lock import LOCK_FILE, Holder, locked
from training.runs import flags, kill, read_log, run_here, start, wait_for_step, weights


KILLS = int(os.environ.get("OPTVQ_KILLS", "1"))


def write_lock(folder, holder):
    (folder / LOCK_FILE).write_text(json.dumps(vars(holder)))


def refused(folder, message):
    with pytest.raises(OSError, match=message), locked(folder):
        pass


def test_a_folder_that_is_held(tmp_path):
    with locked(tmp_path):
        refused(
            tmp_path, f"another run writes to {tmp_path} .process {os.getpid()} on .*, started 2.*: wait for its end"
        )
    with pytest.raises(ValueError), locked(tmp_path):
        raise ValueError
    with locked(tmp_path):  # it was released after the error
        pass
    assert not list(tmp_path.iterdir())


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    with locked(tmp_path / "new"):
        pass
    with locked(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert not (tmp_path / "new").exists() and (tmp_path / "used" / "file").exists()


WRONG_ENTRIES = (
    *({"pid": value} for value in ("x", -1, 10**30, 1.5, None, [])),
    *({name: value} for name in ("host", "machine") for value in (3, None, {})),
    *({"started": value} for value in ("x", -1, 1e300, float("nan"), None)),
)


def test_stale_locks_are_taken_over(tmp_path, monkeypatch):
    """Of a process that has ended, or whose number another process has now, or that was killed while it wrote the lock."""
    monkeypatch.setattr(lock, "WRITING_TIME", 0.1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(ended.pid).create_time()
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:  # nobody has asked for its exit code yet
        time.sleep(0.01)
    me = Holder.myself()
    stale = [
        replace(me, pid=ended.pid, started=started),
        replace(me, started=me.started - 3600),
        replace(me, pid=2**22 + 1, started=1),
        replace(me, pid=2**22 + 1, started=1, machine=""),  # where the system does not name the machine
    ]
    for holder in stale:
        write_lock(tmp_path, holder)
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text()) == vars(me)
    ended.wait()
    for content in (
        *(b"", b'{"pid": 1', b"[]", b"\xff\xfe", b"[" * 100_000),
        *(json.dumps({**vars(me), **wrong}).encode() for wrong in WRONG_ENTRIES),
    ):
        (tmp_path / LOCK_FILE).write_bytes(content)
        with locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["node-7", socket.gethostname()])
def test_other_machines_live_as_long_as_their_heart_beats(tmp_path, monkeypatch, capsys, host):
    """Also one with the same host name, where the number of the process says nothing."""
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "SILENCE", 2.0)
    other = Holder(os.getpid(), host, 1e9, "another machine")
    write_lock(tmp_path, other)
    ended = threading.Event()
    text = (tmp_path / LOCK_FILE).read_text()
    heart = threading.Thread(target=lock._beat, args=(tmp_path / LOCK_FILE, text, ended))
    heart.start()
    refused(tmp_path, f"process {os.getpid()} on {host}, started 2001.*: wait for its end, or choose another")
    assert "waiting up to 2 seconds to see whether that run lives" in capsys.readouterr().out
    ended.set()
    heart.join()
    with locked(tmp_path):  # after two seconds of silence
        assert Holder.from_text((tmp_path / LOCK_FILE).read_text()) == Holder.myself()
    assert not list(tmp_path.iterdir())


def test_a_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    """And neither touched nor removed when another run has it."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK_FILE, (1, 1))
        until = time.monotonic() + 10
        while (tmp_path / LOCK_FILE).stat().st_mtime == 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert (tmp_path / LOCK_FILE).stat().st_mtime > 1
        (tmp_path / LOCK_FILE).unlink()
        write_lock(tmp_path, Holder(1, "node-7", 1e9))
        os.utime(tmp_path / LOCK_FILE, (1, 1))
        time.sleep(0.3)
        assert (tmp_path / LOCK_FILE).stat().st_mtime == 1
    assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.slow
def test_one_of_many_takes_a_stale_lock_over(tmp_path):
    """Processes that start at the same time: each gets the folder in the end, and notes that it was alone there."""
    script = """
import os, random, sys, time
from pathlib import Path
from optvq_hf.training.lock import locked
folder, start, kind = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
time.sleep(max(0, start - time.time()))
held, end = 0, time.monotonic() + 60
while held < 10 and time.monotonic() < end:
    try:
        with locked(folder):
            file = os.open(folder / "alone", os.O_CREAT | os.O_EXCL)
            os.close(file)
            time.sleep(0.001)
            os.unlink(folder / "alone")
            print("held")
            held += 1
            if kind == "killed":
                os.kill(os.getpid(), 9)
    except FileExistsError:
        print("not alone")
    except OSError:
        pass
    time.sleep(random.random() / 1000)
"""
    write_lock(tmp_path, replace(Holder.myself(), pid=2**22 + 1, started=1))
    begin = str(time.time() + 8)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kinds = ("killed", "killed", "ended", "ended")
    runs = [
        subprocess.Popen(
            [sys.executable, "-u", "-c", script, str(tmp_path), begin, kind],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for kind in kinds
    ]
    shown = [run.communicate()[0] for run in runs]
    assert shown == ["held\n" * (1 if kind == "killed" else 10) for kind in kinds]


def test_a_refused_run_touches_nothing(tmp_path, capsys):
    main(flags(tmp_path, max_steps=6, save_every=3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with locked(tmp_path):
        for resume in ({}, {"resume": "auto"}):
            with pytest.raises(SystemExit) as stopped:
                main(flags(tmp_path, max_steps=6, **resume))
            assert stopped.value.code == 1 and "another run writes to" in capsys.readouterr().err
        (tmp_path / LOCK_FILE).rename(tmp_path / "kept")
        assert {
            path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "kept"
        } == before
        (tmp_path / "kept").rename(tmp_path / LOCK_FILE)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_double_starts(tmp_path):
    """Four, or with OPTVQ_KILLS=5 twenty: all are refused in one line.

    The first run ends with the weights and the log of a run that was alone.
    """
    settings, generator = {"max_steps": 600 * KILLS, "save_every": 50, "log_every": 1}, random.Random(0)
    folder = tmp_path / "first"
    first = start(folder, **settings)
    wait_for_step(first, folder, 1)
    for _ in range(KILLS):
        seconds = [start(folder, **settings, **resume) for resume in 2 * ({}, {"resume": "auto"})]
        for second in seconds:
            [line] = [line for line in second.communicate()[0].splitlines() if "error" in line]
            assert second.returncode == 1 and f"another run writes to {folder} (process {first.pid} on " in line
        assert first.poll() is None, "the first run ended too early for this test"
        time.sleep(generator.random())
    assert first.wait(900) == 0
    run_here(tmp_path / "alone", **settings)
    expected, actual = weights(tmp_path / "alone"), weights(folder)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert [entry["step"] for entry in read_log(folder)] == list(range(1, 600 * KILLS + 1))


@pytest.mark.slow
def test_a_killed_run_leaves_a_stale_lock(tmp_path, capsys):
    run = start(tmp_path, max_steps=120)
    wait_for_step(run, tmp_path, 20)
    kill(run, signal.SIGKILL)
    run.wait()
    assert (tmp_path / LOCK_FILE).is_file()
    run_here(tmp_path, max_steps=120, resume="auto")
    assert "resuming" in capsys.readouterr().out
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.distributed
def test_the_other_processes_learn_of_the_refusal(tmp_path):
    with locked(tmp_path):
        run = start(tmp_path, processes=2, max_steps=4)
        shown = run.communicate(timeout=120)[0]
    assert run.returncode != 0 and shown.count("another run writes to") >= 2
    assert not (tmp_path / "training_log.jsonl").exists()
