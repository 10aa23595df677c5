"""Checkpoints that were interrupted or damaged: the newest whole state is resumed from, whatever was changed last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import crashes

PROJECT = Path(crashes.__file__).parents[3]


def test_a_training_killed_or_refused_at_any_change_or_damaged_later_resumes_from_what_it_had(tmp_path: Path) -> None:
    """In a process of its own: each of its forks then copies little."""
    command = [sys.executable, crashes.__file__, "60", str(tmp_path / "found.json")]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())["came_of_them"]
    assert sum(found.values()) == 60
    assert {what.split(",")[0] for what in found} == {"killed", "refused", "flip", "cut", "delete"}
    assert {what.split(",")[1] for what in found} == {" uploading", " on a disk"}
