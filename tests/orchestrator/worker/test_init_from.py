"""The training loop from a Hugging Face folder to an exported one, on two ranks."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import Fivefold
from families import FAMILIES, random_weights
from sample_runs import make_run

from jobs.architecture import ModelArchitecture
from jobs.spec import CheckpointSpec, ClusterSpec, DataSpec, JobSpec, LayoutSpec, PolicySpec, TrainSpec
from models.huggingface import source, write
from models.reference import Decoder
from models.weights import fill, whole
from orchestrator.messages import RankLaunch
from orchestrator.pulse import new_page
from orchestrator.run_folder import RunFolder
from orchestrator.worker import data
from orchestrator.worker import main as worker
from orchestrator.worker.ranks import Ranks

MODEL = ModelArchitecture.model_validate(FAMILIES["mixtral"].model_dump() | {"vocab": 264})


def spec(weights: Path, cache: Path) -> JobSpec:
    return JobSpec(
        name="tuned",
        model=MODEL,
        init_from=str(weights),
        data=DataSpec(files=("stdlib:json/*.py",), cache=str(cache)),
        cluster=ClusterSpec(name="test", device="cpu", hardware="laptop", devices_per_node=2),
        layout=LayoutSpec(tp=1, cp=1, pp=1, vpp=1, dp=2, ep=2, etp=1, micro_batch=2),
        train=TrainSpec(
            steps=2, sequence_length=16, global_batch=4, precision="fp32", learning_rate=1e-2, eval_batches=0
        ),
        checkpoint=CheckpointSpec(interval=1),
        policy=PolicySpec(),
    )


def train(rank: int, job: JobSpec, run_folder: str, steps: tuple[int, ...]) -> tuple[int, list[dict[str, Any]]]:
    """What a forked rank does; returns its exit code and what it reported."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = torch.tensor(listener.getsockname()[1])
        dist.broadcast(port, 0)
        dist.destroy_process_group()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        launch = RankLaunch(
            run_id="tuned-1",
            attempt=1,
            rank=rank,
            local_rank=rank,
            store_address="127.0.0.1",
            store_port=int(port),
            run_folder=run_folder,
            job=job,
            checkpoint_steps=steps,
        )
        store = os.dup(listener.fileno()) if rank == 0 else None
        code = worker.run(launch, theirs.detach(), new_page(), os.memfd_create("snapshots"), store)
    ours.settimeout(0.1)
    return code, [json.loads(packet) for packet in _packets(ours)]


def _packets(reports: socket.socket) -> Iterator[bytes]:
    try:
        while packet := reports.recv(1 << 20):
            yield packet
    except TimeoutError:
        return


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    list(write(folder, MODEL, random_weights(MODEL).__getitem__, torch.float32, 16))
    return folder


def oracle_loss(job: JobSpec, weights: Path, step: int) -> float:
    """With the weights of a folder, on a step's global batch."""
    (batch,) = data.open_data(job.data, job.train, MODEL.vocab).batches(step, 0, 1, job.train.global_batch)
    read, decoder = source(str(weights), MODEL), Decoder(MODEL)
    fill((whole(name, tensor) for name, tensor in decoder.state_dict().items()), read)
    with torch.no_grad():
        logits = decoder(torch.from_numpy(batch.tokens)).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten()))


def test_a_run_begins_with_the_folder_s_weights_and_its_checkpoint_is_exported(
    ranks: Ranks, fivefold: Fivefold, weights: Path, run_root: Path, tmp_path: Path
) -> None:
    job = spec(weights, tmp_path / "cache")
    run = make_run(str(run_root / "tuned-1"), job)
    (code, reports), (other, _) = ranks.run(2, train, job, run.place, ())
    assert (code, other) == (0, 0), reports
    told = [report for report in reports if report["type"] == "event"]
    assert [event["kind"] for event in told][:2] == ["weights_read", "training_started"]
    assert told[0]["message"].startswith(f"weights read from {weights} in ")
    steps = [report for report in reports if report["type"] == "step"]
    assert steps[0]["loss"] == pytest.approx(oracle_loss(job, weights, 1), rel=1e-5)

    answer = fivefold("checkpoint", "export", "tuned-1", "--to", str(tmp_path / "out"), "--json")
    assert answer.code == 0, answer.err
    written = answer.document
    assert (written["step"], written["family"], written["folder"]) == (2, "mixtral", str(tmp_path / "out"))
    assert set(written["files"]) == {"config.json", "model.safetensors"}
    assert written["size_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())

    # The run goes on from its checkpoint, not from the folder, and from the weights that were exported.
    longer = job.model_copy(update={"train": job.train.model_copy(update={"steps": 3})})
    ((_, resumed), _) = ranks.run(2, train, longer, run.place, (2,))
    assert not any(report.get("kind") == "weights_read" for report in resumed)
    (third,) = [report for report in resumed if report["type"] == "step"]
    assert third["loss"] == pytest.approx(oracle_loss(job, tmp_path / "out", 3), rel=1e-5)


def test_another_model_s_weights_are_refused_by_every_rank(ranks: Ranks, weights: Path, tmp_path: Path) -> None:
    job = spec(weights, tmp_path / "cache")
    wider = job.model_copy(update={"model": MODEL.model_copy(update={"ffn": 0, "expert_ffn": 32})})
    outcomes = ranks.run(2, train, wider, RunFolder(str(tmp_path / "run")).place, ())
    assert [code for code, _ in outcomes] == [2, 2]
    (event,) = outcomes[0][1]
    assert event["kind"] == "input_error"
    assert event["message"] == f"model.expert_ffn=32: is 24 in {weights}/config.json; nearest valid: 24"
