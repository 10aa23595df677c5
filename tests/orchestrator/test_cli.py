"""Every verb, in this process and without Ray: what it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Fivefold
from sample_runs import change_json, make_run

from orchestrator.control import doctor
from orchestrator.run_folder import RunFolder
from parallel.layout import Layout

ROOT = Path(__file__).parents[2]


# Verbs that read.


def test_list(fivefold: Fivefold, run: RunFolder) -> None:
    answer = fivefold("list")
    assert answer.code == 0
    assert answer.out.splitlines()[1].split()[:4] == ["quick-1", "interrupted", "1", "40"]
    document = fivefold("list", "--json").document
    assert [each["run_id"] for each in document["runs"]] == ["quick-1"]
    assert document["runs"][0]["run_folder"] == run.place


def test_an_empty_list(fivefold: Fivefold, run_root: Path) -> None:
    assert fivefold("list").out == f"no runs under {run_root}\n"
    assert fivefold("list", "--json").document == {"run_root": str(run_root), "runs": []}
    assert not run_root.exists()


@pytest.mark.parametrize("named", ["quick-1", "last", "its path"])
def test_status(fivefold: Fivefold, run: RunFolder, named: str) -> None:
    rank = {"rank": 0, "pid": 7, "node": "host-0", "state": "left", "step": 40}
    change_json(run, "status.json", ranks=[rank])
    answer = fivefold("status", run.place if named == "its path" else named, "--json")
    assert (answer.code, answer.err) == (0, "")
    document = json.loads(answer.out)
    assert (document["state"], document["attempt"], document["step"]) == ("interrupted", 1, 40)
    assert (document["layout"], document["ranks"]) == (Layout(tp=2, dp=2, ep=2).as_dict(), [rank])
    assert (document["run_folder"], document["steps"], document["ledger"]) == (run.place, 100, {"productive": 20.0})
    assert "attempt 1, step 40 of 100, layout tp2 dp2 ep2" in fivefold("status", named.replace("its path", "last")).out


def test_logs(fivefold: Fivefold, run: RunFolder) -> None:
    assert fivefold("logs", "quick-1", "--rank", "1").out == "hello\nfrom rank 1\n"
    assert fivefold("logs", "quick-1", "--rank", "1", "--json").document == {
        "run_id": "quick-1",
        "log": "logs/attempt-1/rank-1.log",
        "lines": ["hello", "from rank 1"],
    }
    story = fivefold("logs", "quick-1", "-f").out.splitlines()  # a run that has ended has nothing more to tell
    assert "writing a checkpoint" in story[0]
    assert [line.split()[0] for line in story[1:]] == ["step", "39", "40"]


def test_events(fivefold: Fivefold, run: RunFolder) -> None:
    (line,) = fivefold("events", "quick-1").out.splitlines()
    message = "interrupted at step 40: writing a checkpoint, then leaving"
    assert line.endswith(f"  attempt 1  stopping            {message}")
    (event,) = fivefold("events", "quick-1", "--json").document["events"]
    assert (event["kind"], event["message"]) == ("stopping", message)


def test_checkpoint_ls(fivefold: Fivefold, run: RunFolder) -> None:
    assert [line.split()[0] for line in fivefold("checkpoint", "ls", "quick-1").out.splitlines()] == [
        *("step", "40", "20")
    ]
    found = fivefold("checkpoint", "ls", "quick-1", "--json").document["checkpoints"]
    assert [(each["step"], len(each["files"])) for each in found] == [(40, 2), (20, 2)]
    run.write("checkpoints/step-00000040/manifest.json", b"{")
    told = fivefold("checkpoint", "ls", "quick-1").out.splitlines()
    assert (told[1].split()[:2], told[2].split()[0]) == (["40", "damaged"], "20")
    assert "manifest.json: is not JSON" in told[3]
    (damaged,) = fivefold("checkpoint", "ls", "quick-1", "--json").document["damaged"]
    assert (damaged["step"], damaged["problem"]) == (40, told[3])


def test_checkpoint_verify(fivefold: Fivefold, run: RunFolder) -> None:
    answer = fivefold("checkpoint", "verify", "quick-1")
    assert (answer.code, answer.out) == (0, "step 40: whole, 2 files\nstep 20: whole, 2 files\n")
    run.write("checkpoints/step-00000020/common.pt", b"step 21")
    answer = fivefold("checkpoint", "verify", "quick-1")
    assert answer.code == 3
    assert answer.out.splitlines()[0] == "step 40: whole, 2 files"
    assert answer.out.splitlines()[1].startswith("step 20: checkpoints/step-00000020/common.pt has SHA-256 ")
    verdicts = fivefold("checkpoint", "verify", "quick-1", "--json").document["checkpoints"]
    assert [(each["step"], each["whole"], len(each["problems"])) for each in verdicts] == [
        (40, True, 0),
        (20, False, 1),
    ]


def test_a_run_without_checkpoints(fivefold: Fivefold, run_root: Path) -> None:
    make_run(str(run_root / "quick-1"))
    for verb in ("ls", "verify"):
        answer = fivefold("checkpoint", verb, "quick-1")
        assert (answer.code, answer.out) == (0, "quick-1 has no checkpoint\n")
        assert fivefold("checkpoint", verb, "quick-1", "--json").document["checkpoints"] == []


def test_schema(fivefold: Fivefold) -> None:
    text, document = fivefold("schema").out, fivefold("schema", "--json").out
    assert json.loads(text) == json.loads(document)
    assert json.loads(text)["additionalProperties"] is False


def test_doctor(fivefold: Fivefold, run_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LOW_DISK_BYTES", 0)
    answer = fivefold("doctor")
    assert answer.code == 0, answer.out
    assert all(line.startswith("ok  ") for line in answer.out.splitlines())
    findings = {each["name"]: each for each in fivefold("doctor", "--json").document["findings"]}
    assert {"python", "packages", "torch", "ray", "devices", "run root"} <= set(findings)
    assert str(run_root) in findings["run root"]["text"]
    assert not run_root.exists()


def test_doctor_finds_what_is_wrong(fivefold: Fivefold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PINNED", {"ray": "0.0.1", "no-such-package": "1"})
    answer = fivefold("doctor", "--run-root", "bogus://runs")
    assert answer.code == 3
    bad = [line.split()[1] for line in answer.out.splitlines() if line.startswith("BAD ")]
    assert bad == ["ray", "no-such-package", "run"]
    assert "pip install ray==0.0.1" in answer.out


# Planning.


def test_plan(fivefold: Fivefold, run_root: Path) -> None:
    answer = fivefold("plan", "quickstart", "layout.tp=2", "--top", "1")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert lines[0] == "quickstart on 1 x 4 laptop_cpu, fp32"
    assert lines[4].split()[:2] == ["1", "tp2"]
    assert not any(line.strip().startswith("2 ") for line in lines[5:7])
    document = json.loads(fivefold("plan", "--json", "quickstart", "layout.tp=2", "--top", "1").out)
    (plan,) = document["plans"]
    assert plan["layout"]["tp"] == 2
    assert plan["memory_bytes"]["total"] > 0
    assert document["considered"] >= sum(each["count"] for each in document["rejections"])
    assert not run_root.exists()


def test_overrides_may_stand_anywhere(fivefold: Fivefold) -> None:
    answer = fivefold("plan", "quickstart", "layout.tp=2", "--top", "1", "train.steps=5", "--json", "layout.ep=2")
    assert answer.document["plans"][0]["layout"]["ep"] == 2


def test_planning_imports_no_engine() -> None:
    code = (
        "import sys; from orchestrator.cli import run; code = run(['plan', 'quickstart']);"
        "heavy = {'torch', 'ray', 'deepspeed', 'megatron', 'numpy', 'fsspec', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


# The process.


def test_help_lists_every_verb() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0
    verbs = {"plan", "run", "submit", "list", "status", "logs", "events", "cancel", "resume", "schema", "doctor"}
    described = {line.split()[0] for line in ended.stdout.splitlines() if line.startswith("    ")}
    assert verbs | {"checkpoint", "control"} <= described


@pytest.mark.parametrize("verb", ["events", "logs"])
def test_a_reader_that_has_had_enough_ends_nothing_in_anger(run: RunFolder, run_root: Path, verb: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [sys.executable, "-m", "orchestrator.cli", verb, "quick-1", "--run-root", str(run_root)]
    ended = subprocess.run(arguments, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")
