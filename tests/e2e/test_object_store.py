"""A run folder in an object store: S3's protocol, served by moto on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import fsspec
import pytest
from command import INTERVAL, JOB, STEPS, Fivefold, Opened, assert_same_curve, kinds
from command import seconds_to_next_step as recovery
from moto.server import ThreadedMotoServer

from orchestrator.run_folder import RunFolder

ROOT = "s3://bucket/runs"


@pytest.fixture
def store(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fivefold]:
    """`fivefold` with its run root in an empty bucket; the environment says where that is, as for any S3 client."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line a request in the report of a failure
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").mkdir("bucket")
    try:
        with opened(ROOT, **environment) as fivefold:
            yield fivefold
    finally:
        server.stop()


def test_a_fault_and_a_resume_at_an_object_store(store: Fivefold, reference: dict[int, tuple[float, float]]) -> None:
    nowhere = store("run", JOB, "--run-root", "s3://no-such-bucket/runs")
    assert (nowhere.code, "cannot be written" in nowhere.told) == (2, True), nowhere.told

    started = store.start("run", JOB, "fault.kill_rank=3", "fault.at_step=6")
    run = store.run_of(started)
    assert run.place == f"{ROOT}/{run.run_id}"
    answer = started.finish()
    assert answer.code == 0, answer.told
    assert (answer.document["state"], answer.document["attempts"]) == ("done", 2)
    assert_same_curve(run, reference)
    assert kinds(run).count("fault_injected") == 1
    injected_at = next(event["at"] for event in run.read_lines("events.jsonl") if event["kind"] == "fault_injected")
    print(f"seconds from kill to next step at an object store: {recovery(run, injected_at, 2):.2f}")
    assert recovery(run, injected_at, 2) < 5
    assert run.read("loss.png").startswith(b"\x89PNG")

    answer = store("resume", run.place, f"train.steps={STEPS + INTERVAL}")
    assert answer.code == 0, answer.told
    assert answer.document["step"] == STEPS + INTERVAL
    assert_the_verbs_read(store, run)


def assert_the_verbs_read(store: Fivefold, run: RunFolder) -> None:
    """By the URL of the run as by its id."""
    status = store.ask("status", run.place).document
    assert (status["state"], status["attempt"], status["step"]) == ("done", 3, STEPS + INTERVAL)
    assert {rank["state"] for rank in status["ranks"]} == {"done"}
    assert store.ask("list").document["runs"][0]["run_id"] == run.run_id
    assert store.ask("events", run.run_id).document["events"][-1]["kind"] == "run_done"
    assert store.ask("logs", run.run_id, "--rank", "2").document["log"] == "logs/attempt-3/rank-2.log"
    verified = store.ask("checkpoint", "verify", run.place)
    assert verified.code == 0
    assert [each["step"] for each in verified.document["checkpoints"]] == [STEPS + INTERVAL, STEPS, STEPS - INTERVAL]
