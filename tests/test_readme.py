"""The README's commands are ones that the command line takes, and its output is laid out as the display lays it out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from jobs.compose import compose, job_names
from orchestrator import cli
from orchestrator.control import display
from parallel.planning.planner import plan_job

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(r"^    fivefold (.+)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    options = cli.parse(shlex.split(command, comments=True))
    if getattr(options, "job", None) in job_names():
        assert plan_job(compose(options.job, options.overrides)).plans


def test_every_verb_is_explained() -> None:
    for verb in ("plan", "run", "submit", "list", "status", "logs", "events", "cancel", "resume", "doctor", "schema"):
        assert any(command.split()[0] == verb for command in COMMANDS), verb


def test_the_sample_output_has_the_columns_of_today() -> None:
    assert display.HEADER.split() == next(line for line in README.splitlines() if "grad norm" in line).split()


def test_the_refusal_that_is_shown_is_what_is_said() -> None:
    command, said = re.search(r"^    \$ fivefold (.+)\n    (fivefold: .+)$", README, flags=re.MULTILINE).groups()  # type: ignore[union-attr]
    words = command.split()
    with pytest.raises(Exception, match=re.escape(said.removeprefix("fivefold: "))):
        plan_job(compose(words[1], words[2:]))
