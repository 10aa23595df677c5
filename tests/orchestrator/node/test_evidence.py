"""What is gathered of a rank from outside: its stack, and the record that NCCL's own thread writes when asked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.node import evidence

# Stands for NCCL's thread, which a machine without GPUs has none of: it listens at the pipe that torch is told of, and
# writes where torch is told to, in two goes.
RANK = """
import os, sys, time
from orchestrator.node.evidence import record_collectives
record_collectives()
if sys.argv[1] == "listens":
    pipe = os.environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + "3.pipe"
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDWR), "rb", buffering=0) as asked:
        print("ready", flush=True)
        assert asked.read(1) == b"1"
    with open(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + "3", "wb") as record:
        record.write(b"first ")
        record.flush()
        time.sleep(0.02)
        record.write(b"second")
else:
    print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", RANK, request.param], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.kill()
        process.wait()
        evidence.forget_record(process.pid)
        assert not evidence._folder(process.pid).exists()


@pytest.mark.parametrize("rank", ["listens"], indirect=True)
def test_a_record_is_asked_for_and_taken_whole(rank: int, tmp_path: Path) -> None:
    evidence.gather({3: rank}, tmp_path / "logs")
    assert (tmp_path / "logs/rank-3.collectives").read_bytes() == b"first second"
    assert "Thread" in (tmp_path / "logs/rank-3.stack.txt").read_text()


@pytest.mark.parametrize("rank", ["does not"], indirect=True)
def test_where_nobody_listens_there_is_a_stack(rank: int, tmp_path: Path) -> None:
    began = time.monotonic()
    evidence.gather({3: rank}, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["rank-3.stack.txt"]
    assert time.monotonic() - began < evidence._STACK_SECONDS


def test_a_folder_that_is_not_ours_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evidence, "_folder", lambda pid: tmp_path / "taken")
    (tmp_path / "taken").write_text("somebody's")
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE", raising=False)
    evidence.record_collectives()
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert (tmp_path / "taken").read_text() == "somebody's"
