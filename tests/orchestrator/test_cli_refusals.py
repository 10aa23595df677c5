"""What the command line refuses: one message, exit code 2, and nothing created."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Fivefold, refused
from sample_runs import job

from jobs import credentials
from jobs.errors import InputError
from orchestrator.control import cluster
from orchestrator.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "path", "nearest"),
    [
        (["plan", "quickstrat"], "job", "quickstart"),
        (["plan", "nowhere/mine.yaml"], "job", None),
        (["plan", "quickstart", "layout.pt=2"], "layout.pt", "layout.tp"),
        (["plan", "quickstart", "layout.tp=3"], "layout.tp", "tp=2 or tp=1"),
        (["plan", "quickstart", "layout.ep=16"], "layout.ep", "ep=4 or ep=2 or ep=1"),
        (["plan", "quickstart", "cluster=laptpo"], "cluster", "laptop"),
        (["plan", "quickstart", "engine=deepspeed", "layout.recompute=selective"], "layout.recompute", "full"),
        (["plan", "deepseek_v3"], "model.kv_lora_rank", 0),
        (
            ["run", "quickstart", "engine=deepspeed", "layout.zero_stage=3", "layout.nvme_folder=/nowhere"],
            "layout.nvme_folder",
            None,
        ),
        (["run", "quickstart", "train.steps=0"], "train.steps", 1),
        (["run", "quickstart", "data.files=/nowhere/*.txt"], "data.files", None),
        (["run", "quickstart", "data=indexed", "data.indexed=/nowhere/set"], "data.indexed", None),
        (["run", "quickstart", "data.files=s3://me:pass/word@store/text"], "data.files", None),
        (["run", "quickstart", "--run-root", "s3://me:password@store/runs"], "run root", None),
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


@pytest.mark.parametrize(
    "url", ["s3://me:sword/fish@store/x", "https://h:80/x?a=1&X-Amz-Signature=fish", "gs://b/x?access_token=fish&b=2"]
)
def test_credentials_in_a_url_are_not_shown(fivefold: Fivefold, url: str) -> None:
    planned = refused(fivefold("plan", "quickstart", f"data.files={url}"), "data.files")
    listed = refused(fivefold("list", "--run-root", url), "run root")
    for told in (planned, listed):
        assert "***" in told
        assert "fish" not in told


def test_ports_and_versions_in_a_url_are_no_credentials() -> None:
    assert not list(credentials.found({"data": {"files": ["http://host:8080/a@b", "s3://store/x?versionId=7"]}}))
