"""State in memory, taken up by ranks that were not there when it was written."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, cast

import pytest
import torch
from agent_end import AgentEnd
from small_jobs import small_job, small_model

from jobs.spec import JobSpec
from orchestrator.messages import Event
from orchestrator.snapshot_memory import UNSUMMED, forget_from, headers, start, write_header
from orchestrator.worker import snapshots
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.main import import_engine
from orchestrator.worker.ranks import Ranks
from orchestrator.worker.schedule import learning_rate
from orchestrator.worker.snapshots import Snapshots, _Copy
from parallel.layout import Layout

STEPS = 5
JOBS: dict[str, dict[str, Any]] = {
    "megatron": {"layout": {"tp": 2, "dp": 2, "ep": 2}},
    "megatron in bf16": {"layout": {"dp": 2}, "precision": "bf16"},
    "deepspeed": {"layout": {"dp": 2, "ep": 2, "zero_stage": 2}, "engine": "deepspeed"},
    "deepspeed in bf16": {"layout": {"dp": 2, "zero_stage": 1}, "engine": "deepspeed", "precision": "bf16"},
}


def job(name: str, every: int = 2) -> JobSpec:
    spec = small_job(small_model("deepseek"), steps=STEPS, **JOBS[name])
    return spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update={"snapshot_interval": every})})


@dataclass(frozen=True)
class Train:
    """To the last step, from the newest snapshot that all ranks hold; a file of `folder` stands for a rank's memory."""

    job: JobSpec
    folder: Path

    def __call__(self, rank: int) -> tuple[dict[int, tuple[float, float]], list[Event]]:
        spec, layout = self.job, Layout.of(self.job.layout)
        agent = AgentEnd(spec, rank, self.folder)
        memory = os.open(self.folder / str(rank), os.O_RDWR | os.O_CREAT)
        engine = import_engine(spec.engine, "cpu").build(spec, layout, torch.device("cpu"))
        kept = Snapshots(agent.launch, memory, agent.reporter)
        engine.before_update = kept.finish
        curve = {}
        for step in range((kept.restore(engine, 0) or 0) + 1, STEPS + 1):
            batches = micro_batches(global_batch(spec, step), layout.coordinates(rank)["dp"], layout.dp, 2)
            result = engine.train_step(step, learning_rate(spec.train, step), batches)
            curve[step] = (result.loss, result.grad_norm)
            kept.settle()
            kept.begin(engine, step)
        kept.settle()
        return curve, agent.events()


def train(ranks: Ranks, folder: Path, what: JobSpec) -> tuple[Any, list[Event]]:
    found = ranks.run(Layout.of(what.layout).world, _call, Train(what, folder))
    assert all(curve == found[0][0] for curve, _ in found)
    return found[0][0], [event for _, told in found for event in told]


def _call(rank: int, what: Train) -> Any:
    return what(rank)


@pytest.mark.parametrize("name", JOBS)
def test_ranks_that_take_up_a_snapshot_train_on_to_the_same_bits(ranks: Ranks, tmp_path: Path, name: str) -> None:
    whole, told = train(ranks, tmp_path, job(name))
    assert (set(whole), told) == ({1, 2, 3, 4, 5}, [])
    again, told = train(ranks, tmp_path, job(name, every=0))
    assert [event.kind for event in told] == ["snapshot_restored"]
    assert again == {5: whole[5]}
    if name != "megatron":
        return
    # One rank's is damaged: all begin from the last that each holds whole, and the damage is told.
    with (tmp_path / "1").open("r+b") as memory:
        steps = [header.step for header in headers(memory.fileno())]
        assert sorted(steps) == [2, 4]
        damaged = start(os.fstat(memory.fileno()).st_size, steps.index(4)) + 77
        (byte,) = os.pread(memory.fileno(), 1, damaged)
        os.pwrite(memory.fileno(), bytes([byte ^ 1]), damaged)
    again, told = train(ranks, tmp_path, job(name, every=0))
    assert {event.kind: (event.rank, event.data["step"]) for event in told} == {
        "snapshot_damaged": (1, 4),
        "snapshot_restored": (0, 2),
    }
    assert again == {step: whole[step] for step in (3, 4, 5)}
    # Computed otherwise, the state is the same; divided otherwise it is not, and what was forgotten is not used.
    recomputed = job(name, every=0).layout.model_copy(update={"recompute": "full"})
    again, told = train(ranks, tmp_path, job(name, every=0).model_copy(update={"layout": recomputed}))
    assert set(again) == {3, 4, 5}
    for rank in range(4):
        with (tmp_path / str(rank)).open("r+b") as memory:
            forget_from(memory.fileno(), 2)
    assert set(train(ranks, tmp_path, job(name, every=0))[0]) == set(whole)
    other = small_job(small_model("deepseek"), {"tp": 2, "dp": 2, "ep": 1}, steps=STEPS)
    assert set(train(ranks, tmp_path, other)[0]) == set(whole)


def test_a_copy_is_taken_up_while_its_checksum_is_still_computed(ranks: Ranks, tmp_path: Path) -> None:
    whole, _ = train(ranks, tmp_path, job("megatron"))
    for rank in (0, 2):  # as these ranks' ends would have left it
        with (tmp_path / str(rank)).open("r+b") as memory:
            for place, header in enumerate(headers(memory.fileno())):
                write_header(memory.fileno(), place, header._replace(checksum=UNSUMMED))
    again, told = train(ranks, tmp_path, job("megatron", every=0))
    assert ([event.kind for event in told], again) == (["snapshot_restored"], {5: whole[5]})


def test_state_that_finds_no_room_is_not_kept_and_training_goes_on(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve, told = train(ranks, tmp_path, job("megatron in bf16"))
    assert (len(curve), told) == (STEPS, [])
    assert (tmp_path / "0").stat().st_size > 0
    agent = AgentEnd(job("megatron in bf16"), 0, tmp_path)
    memory = os.open(tmp_path / "none", os.O_RDWR | os.O_CREAT)
    monkeypatch.setattr(snapshots, "available_bytes", lambda: 1000)
    monkeypatch.setattr(snapshots.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(snapshots.dist, "all_gather_object", lambda told, own: told.__setitem__(0, own))
    kept = Snapshots(agent.launch, memory, agent.reporter)

    class Engine:
        def state(self) -> list[torch.Tensor]:
            return [torch.zeros(1000)]

    engine: Any = Engine()
    assert kept.restore(engine, 0) is None
    kept.begin(engine, 2)
    assert not kept.busy
    (report,) = agent.events()
    assert (report.kind, os.fstat(memory).st_size) == ("snapshots_off", 0)


class Link:
    """Stands for a device's stream and for the event on it: piece `late` ends when it `goes_on`."""

    def __init__(self, late: int) -> None:
        self.late, self.pieces = late, 0
        self.waits, self.goes_on = threading.Event(), threading.Event()

    def wait_stream(self, other: object) -> None: ...

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None:
        self.pieces += 1
        if self.pieces == self.late:
            self.waits.set()
            assert self.goes_on.wait(60)


@pytest.fixture
def copied_late(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], tuple[_Copy, list[torch.Tensor], Link]]:
    """Of a state whose pieces are two numbers, by a link where the piece of that number is late; room in bytes."""

    def made(late: int, room: int) -> tuple[_Copy, list[torch.Tensor], Link]:
        link = Link(late)
        for name in ("Event", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda **_: link)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: room)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
        monkeypatch.setattr(snapshots, "_COPIED_BYTES", 8)
        state = [torch.randn(size) for size in (1, 5, 0, 4)]
        copy = _Copy(state, [torch.empty_like(tensor) for tensor in state])
        copy._stream = cast(Any, link)
        return copy, state, link

    return made


PIECES = 6
"""Of 10 numbers, of which no two of different tensors fill one up."""


@pytest.mark.parametrize("late", range(1, PIECES + 1))
def test_an_update_that_comes_meanwhile_is_not_in_the_copy(copied_late: Any, late: int) -> None:
    copy, state, link = copied_late(late, 1000)
    before = [tensor.clone() for tensor in state]
    thread = Thread(target=copy.run)
    thread.start()
    assert link.waits.wait(60)
    assert copy.set_aside()
    for tensor in state:
        tensor.mul_(-2)
    link.goes_on.set()
    thread.join()
    assert link.pieces == len(copy._pieces)
    views = [view for _, targets in copy._pieces for view in targets]
    assert torch.equal(torch.cat(views), torch.cat(before))


def test_without_room_for_twice_as_much_nothing_is_set_aside(copied_late: Any) -> None:
    for room, is_enough in ((79, False), (80, True)):  # ten numbers are 40 bytes
        copy, _, _ = copied_late(0, room)
        assert copy.set_aside() == is_enough
        assert bool(copy._aside) == is_enough


# The tests above see which pieces are set aside; that a device's own streams keep them apart from the update, this one
# sees where there is a GPU.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="set aside is what a device's link has not copied yet")
def test_what_is_set_aside_is_copied_as_it_was_before_the_update() -> None:
    state = [torch.randn(size, device="cuda") for size in (3, 40_000_000, 0, 70_000_000, 5)]
    views = [torch.empty_like(tensor, device="cpu").pin_memory() for tensor in state]
    copy, made = _Copy(state, views), []
    for _ in range(5):
        torch.empty(2_000_000_000, dtype=torch.uint8, device="cuda")  # the peak of a step, which leaves its room
        before = [tensor.cpu() for tensor in state]
        copy.await_update()
        thread = Thread(target=copy.run)
        thread.start()
        made.append(copy.set_aside())
        for tensor in state:
            tensor.mul_(-2)
        thread.join()
        assert all(torch.equal(view, tensor) for view, tensor in zip(views, before, strict=True))
    assert all(made)
    state.append(torch.empty(torch.cuda.max_memory_allocated(), dtype=torch.uint8, device="cuda"))
    full = _Copy(state[:-1], views)
    full.await_update()
    assert not full.set_aside()
