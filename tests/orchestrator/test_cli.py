"""Every verb, in this process and without Ray: what it answers, and how it refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from runs import change_json, event_line, job, make_checkpoint, make_run, metrics_line

from jobs.compose import compose
from jobs.errors import InputError
from orchestrator import cli
from orchestrator.control import cluster, controller, doctor, session
from orchestrator.control.controller import CANCEL_REQUEST
from orchestrator.run_folder import RunFolder
from parallel.planner import plan_job

ROOT = Path(__file__).parents[2]


@dataclass
class Answered:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The last thing on stdout, from a `{` that starts a line."""
        return json.loads(self.out[("\n" + self.out).rindex("\n{\n") :])


Fivefold = Callable[..., Answered]


@pytest.fixture
def run_root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def fivefold(run_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fivefold:
    """`fivefold("status", "quick-1")`, on a machine without GPUs or a Ray cluster."""
    monkeypatch.setenv("FIVEFOLD_RUN_ROOT", str(run_root))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*arguments: str) -> Answered:
        code = cli.run(arguments)
        out, err = capsys.readouterr()
        return Answered(code, out, err)

    return call


@pytest.fixture
def run(run_root: Path) -> RunFolder:
    """A run that was interrupted at step 40, with checkpoints at 20 and 40."""
    made = make_run(str(run_root / "quick-1"), state="interrupted", reason="interrupted at step 40", step=40)
    for step in (20, 40):
        make_checkpoint(made, step)
    made.append("metrics.jsonl", [metrics_line(step) for step in (39, 40)])
    made.append("events.jsonl", [event_line("stopping", "interrupted at step 40: writing a checkpoint, then leaving")])
    made.write_json("ledger.json", {"totals": {"productive": 20.0}})
    made.write("logs/attempt-1/rank-1.log", b"hello\nfrom rank 1\n")
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(answer: Answered, path: str, nearest: object = None) -> str:
    """The one message of a refusal, which is the same in text and in the document where there is one."""
    assert answer.code == 2
    lines = answer.err.splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith(f"fivefold: {path}")
    if answer.out:
        (error,) = answer.document["errors"]
        assert (error["path"], error["nearest"]) == (path, None if nearest is None else str(nearest))
        assert f"fivefold: {answer.document['error']}" == lines[0]
    if nearest is not None:
        assert lines[0].endswith(f"; nearest valid: {nearest}")
    return lines[0]


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
    assert (document["layout"], document["ranks"]) == ("tp2 dp2 ep2", [rank])
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


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "path", "nearest"),
    [
        (["plan", "quickstrat"], "job", "quickstart"),
        (["plan", "nowhere/mine.yaml"], "job", None),
        (["plan", "quickstart", "layout.pt=2"], "layout.pt", "layout.tp"),
        (["plan", "quickstart", "layout.tp=3"], "layout.tp", "tp=2"),
        (["plan", "quickstart", "layout.ep=16"], "layout.ep", "ep=4"),
        (["plan", "quickstart", "cluster=laptpo"], "cluster", "laptop"),
        (["plan", "quickstart", "engine=deepspeed"], "engine", "megatron"),
        (["plan", "deepseek_v3"], "model.kv_lora_rank", 0),
        (["run", "quickstart", "train.steps=0"], "train.steps", 1),
        (["run", "quickstart", "data.files=/nowhere/*.txt"], "data.files", None),
        (["run", "quickstart", "data.tokenizer=/nowhere/bpe.json"], "data.tokenizer", "bytes"),
        (["run", "quickstart", "model.vocab=200"], "model.vocab", 257),
        (["run", "quickstart", "cluster.nodes=2", "layout.dp=2"], "cluster.nodes", 1),
        (["run", "quickstart", "cluster=h200_x2"], "cluster.devices_per_node", "cluster=laptop"),
        (["run", "quickstart", "layout.tp=2", "fault.kill_rank=4"], "fault.kill_rank", 3),
        (["run", "quickstart", "fault.kill_rank=0", "fault.at_step=101"], "fault.at_step", 100),
        (["submit", "quickstart"], "RAY_ADDRESS", "127.0.0.1:6379"),
        (["status", "quick-7"], "run", None),
        (["status", "last"], "run", None),
        (["status", "../quick-1"], "run", None),
        (["status", "Quick!"], "run", None),
        (["logs", "nowhere/at-all"], "run", None),
        (["events", "quick-7"], "run", None),
        (["cancel", "quick-7"], "run", None),
        (["resume", "quick-7"], "run", None),
        (["checkpoint", "verify", "quick-7"], "run", None),
        (["control", "nowhere/at-all"], "run", None),
        (["list", "--run-root", "bogus://runs"], "run root", None),
        (["run", "quickstart", "--run-root", "/proc/nowhere"], "run root", None),
        (["statsu", "quick-1"], "verb", "status"),
        ([], "command line", None),
        (["plan"], "command line", None),
        (["status", "a", "b"], "command line", None),
        (["plan", "quickstart", "--bogus"], "command line", None),
        (["plan", "quickstart", "--top", "0"], "command line", None),
        (["logs", "last", "--rank", "x"], "command line", None),
        (["checkpoint", "lsit", "last"], "command line", None),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(
    fivefold: Fivefold, run_root: Path, arguments: list[str], path: str, nearest: object
) -> None:
    answer = fivefold(*arguments, "--json")
    refused(answer, path, nearest)
    json.loads(answer.out)  # one document, and nothing else
    assert not run_root.exists()


def test_without_json_a_refusal_prints_nothing_on_stdout(fivefold: Fivefold) -> None:
    answer = fivefold("plan", "quickstrat")
    assert (answer.code, answer.out) == (2, "")
    refused(answer, "job")


def test_several_mistakes_are_one_message_each(fivefold: Fivefold) -> None:
    answer = fivefold("plan", "quickstart", "train.steps=0", "layout.tp=x", "--json")
    assert answer.code == 2
    assert [error["path"] for error in answer.document["errors"]] == ["layout.tp", "train.steps"]
    assert len(answer.err.splitlines()) == 2
    first = answer.document["errors"][1]
    assert first == {
        "path": "train.steps",
        "value": "0",
        "rule": "should be greater than or equal to 1",
        "nearest": "1",
    }


@pytest.mark.parametrize(("content", "said"), [(None, "matches nothing"), (b"", "all of 0 bytes")])
def test_unreadable_or_empty_text(
    fivefold: Fivefold, run_root: Path, tmp_path: Path, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    answer = fivefold("run", "quickstart", f"data.files={tmp_path}/text.txt")
    assert said in refused(answer, "data.files")
    assert not run_root.exists()


def test_a_run_root_that_is_a_file(fivefold: Fivefold, run_root: Path) -> None:
    run_root.write_text("mine")
    assert "cannot be written: Not a directory" in refused(fivefold("run", "quickstart"), "run root")
    assert run_root.read_text() == "mine"


@pytest.mark.parametrize("verb", [("status",), ("list",), ("checkpoint", "ls"), ("resume",), ("cancel",)])
@pytest.mark.parametrize("name", ["status.json", "job.json"])
def test_a_run_folder_that_was_tampered_with(
    fivefold: Fivefold, run: RunFolder, verb: tuple[str, ...], name: str
) -> None:
    reads = {"status.json": {"status", "list", "resume", "cancel"}, "job.json": {"status", "resume"}}
    run.write(name, b"{")
    answer = fivefold(*verb, *(["quick-1"] if verb != ("list",) else []))
    if verb[0] in reads[name]:
        assert "Expecting property name enclosed in double quotes" in refused(answer, run.path(name))
    else:
        assert answer.code in (0, 2)


def test_a_run_folder_without_a_status(fivefold: Fivefold, run: RunFolder) -> None:
    run.remove("status.json")
    assert "is missing" in refused(fivefold("status", "quick-1"), run.path("status.json"))


# Ray addresses.


@pytest.mark.parametrize("address", ["host:port", "http://", "127.0.0.1:99999", "http://[::1"])
def test_a_malformed_ray_address(fivefold: Fivefold, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    said = refused(fivefold("submit", "quickstart"), "RAY_ADDRESS", "127.0.0.1:6379")
    assert "is not host:port or http://host:port" in said


@pytest.fixture
def unanswered() -> Iterator[int]:
    """A port that is taken but not listened at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "http://127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_ray_address_that_does_not_answer(
    fivefold: Fivefold, run_root: Path, monkeypatch: pytest.MonkeyPatch, unanswered: int, form: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", form.format(unanswered))
    said = refused(fivefold("submit", "quickstart"), "RAY_ADDRESS")
    assert said == f"fivefold: RAY_ADDRESS={form.format(unanswered)}: does not answer: Connection refused"
    assert not run_root.exists()


def test_a_ray_address_where_something_else_answers(
    fivefold: Fivefold, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up(server: socket.socket) -> None:
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.getsockname()[1]}")
        said = refused(fivefold("submit", "quickstart"), "RAY_ADDRESS")
        server.shutdown(socket.SHUT_RDWR)
    assert "does not accept jobs: " in said
    assert not run_root.exists()


# GPUs.


def test_gpus_are_counted_as_far_as_they_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    class Devices:
        def __init__(self, place: str) -> None:
            assert place == "/dev"

        def glob(self, pattern: str) -> list[Path]:
            return [Path(name) for name in ("/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-uvm")]

    monkeypatch.setattr(cluster, "Path", Devices)
    for visible, count in (("0", 1), ("", 0), ("0,1", 2), ("0,1,2,3", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert cluster.local_gpus() == count
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert cluster.local_gpus() == 2
    cluster.check_embedded(job("cluster=h200_x2").cluster)
    with pytest.raises(InputError) as caught:
        cluster.check_embedded(job("cluster=h200_x8").cluster)
    assert (caught.value.value, caught.value.nearest) == (8, 2)


# Cancelling and resuming.


@pytest.mark.parametrize("state", ["done", "failed", "cancelled", "interrupted"])
def test_a_run_that_has_ended_cannot_be_cancelled(fivefold: Fivefold, run: RunFolder, state: str) -> None:
    change_json(run, "status.json", state=state)
    assert f"is not running: it is {state}" in refused(fivefold("cancel", "quick-1"), "run")
    assert not run.exists(CANCEL_REQUEST)


def test_cancelling_waits_until_the_run_has_ended(
    fivefold: Fivefold, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_json(run, "status.json", state="running")

    def controllers(asked: RunFolder) -> None:
        change_json(asked, "status.json", state="cancelled", reason="cancelled at step 40")

    monkeypatch.setattr(controller, "cancel", controllers)
    answer = fivefold("cancel", "quick-1")
    assert (answer.code, answer.out) == (0, "quick-1 is cancelled: cancelled at step 40\n")


def test_a_run_that_nobody_controls_yet_can_be_asked(
    fivefold: Fivefold, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job()
    run = session.create(spec, plan_job(spec), str(run_root), "cluster")
    monkeypatch.setattr(session, "wait_until", lambda run, ended, patience: run.read_json("status.json"))
    answer = fivefold("cancel", run.run_id)
    assert (answer.code, answer.out) == (3, f"{run.run_id} is queued: None\n")
    assert run.exists(CANCEL_REQUEST)


@pytest.mark.parametrize("state", ["queued", "starting", "running", "stopping"])
def test_a_live_run_cannot_be_resumed(fivefold: Fivefold, run: RunFolder, state: str) -> None:
    change_json(run, "status.json", state=state)
    said = refused(fivefold("resume", "quick-1"), "run")
    assert f"is {state}: its controller is pid {os.getpid()} on {socket.gethostname()}" in said
    assert said.endswith("nearest valid: fivefold cancel quick-1")


@pytest.mark.parametrize(
    ("overrides", "path", "nearest"),
    [
        (["model.layers=8"], "model.layers", None),
        (["model=moe_1b"], "model", None),
        (["data.files=a.txt"], "data.files", None),
        (["train.seed=1"], "train.seed", None),
        (["train.global_batch=32"], "train.global_batch", None),
        (["engine=deepspeed"], "engine", None),
        (["name=other"], "name", None),
        (["train.steps=30"], "train.steps", "train.steps=80"),
        (["train.steps=0"], "train.steps", 1),
        (["layout.tp=3"], "layout.tp", "tp=2"),
        (["layout.pt=2"], "layout.pt", "layout.tp"),
        (["cluster=h200"], "cluster", "h200_x8"),
        (["cluster=h200_x2"], "cluster.devices_per_node", "cluster=laptop"),
        (["cluster.nodes=2"], "cluster.nodes", 1),
        (["fault.kill_rank=4"], "fault.kill_rank", 3),
        (["oops"], "override", None),
    ],
)
def test_a_resumption_that_is_refused_leaves_the_run_untouched(
    fivefold: Fivefold, run: RunFolder, run_root: Path, overrides: list[str], path: str, nearest: object
) -> None:
    before = contents(run_root)
    refused(fivefold("resume", "quick-1", *overrides, "--json"), path, nearest)
    assert contents(run_root) == before


def test_a_finished_run_cannot_be_resumed(fivefold: Fivefold, run: RunFolder, run_root: Path) -> None:
    make_checkpoint(run, 100)
    change_json(run, "status.json", state="done")
    before = contents(run_root)
    said = refused(fivefold("resume", "quick-1"), "train.steps", "train.steps=200")
    assert "100 steps of quick-1 are trained" in said
    assert contents(run_root) == before


def test_a_run_with_a_checkpoint_of_another_model_or_format_cannot_be_resumed(
    fivefold: Fivefold, run: RunFolder
) -> None:
    make_checkpoint(run, 40, job("model.layers=8"))
    place = f"{run.place}/checkpoints/step-00000040"
    assert "another model: layers 8 there, 4 here" in refused(fivefold("resume", "quick-1"), place)
    change_json(run, "checkpoints/step-00000040/manifest.json", format=2)
    assert "is of checkpoint format 2" in refused(fivefold("resume", "quick-1"), f"{place}/manifest.json")


def test_a_run_whose_text_is_gone_cannot_be_resumed(fivefold: Fivefold, run: RunFolder, run_root: Path) -> None:
    run.write_json("job.json", job("data.files=/nowhere/text.txt").model_dump(mode="json"))
    before = contents(run_root)
    refused(fivefold("resume", "quick-1"), "data.files")
    assert contents(run_root) == before


def test_a_submitted_run_is_resumed_where_it_was(fivefold: Fivefold, run: RunFolder, run_root: Path) -> None:
    change_json(run, "status.json", where="cluster")
    before = contents(run_root)
    refused(fivefold("resume", "quick-1"), "RAY_ADDRESS", "127.0.0.1:6379")
    assert contents(run_root) == before


def test_a_resumed_job_keeps_its_layout_or_is_planned_anew(run: RunFolder) -> None:
    saved = job()
    assert session.resumed_job(run, []) == saved
    assert session.resumed_job(run, ["train.steps=200"]).layout == saved.layout
    replanned = session.resumed_job(run, ["layout.pp=2"])
    assert replanned.layout.pp == 2
    assert None not in replanned.layout.model_dump().values()
    spent = saved.model_copy(update={"fault": compose("quickstart", ["fault.kill_rank=3"]).fault})
    run.write_json("job.json", spent.model_dump(mode="json"))
    assert session.resumed_job(run, ["cluster.devices_per_node=2"]).fault.kill_rank == 3  # it has happened


def test_each_submission_of_a_run_has_an_id_that_ray_has_not_seen(run: RunFolder) -> None:
    class Client:
        def __init__(self) -> None:
            self.submitted: list[dict[str, Any]] = []

        def submit_job(self, **job: Any) -> None:
            self.submitted.append(job)

    client, spec = Client(), job()
    for _ in range(3):
        session.submit(run, spec, client)
        session.resume(run, spec, ["train.steps=200"])
    assert [each["submission_id"] for each in client.submitted] == ["quick-1", "quick-1-1", "quick-1-2"]
    assert client.submitted[0]["entrypoint"].endswith(f"exec fivefold control {run.place}")


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
