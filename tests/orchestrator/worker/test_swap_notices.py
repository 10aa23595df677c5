"""What a run is told of its swapped activations: what was copied, waited for, and found no room."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from small_jobs import small_job, small_model

from jobs.spec import JobSpec
from orchestrator.worker.engines import swapping
from orchestrator.worker.engines.swapping import SETTLED_STEP, SwapNotices
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.main import import_engine
from orchestrator.worker.ranks import Ranks
from parallel import host_link
from parallel.layout import Layout

Told = list[tuple[str, str, dict[str, Any]]]


def _told(rank: int, spec: JobSpec, room: float | None) -> Told:
    """Of some steps; room: bytes of host memory for this rank, however many there are."""
    if room is not None:
        swapping.HOST_SHARE = room * spec.cluster.devices_per_node / swapping.available_bytes()
    layout = Layout.of(spec.layout)
    engine = import_engine(spec.engine, "cpu").build(spec, layout, torch.device("cpu"))
    notices, told = SwapNotices(spec, rank), []
    assert spec.layout.micro_batch is not None
    for step in range(1, SETTLED_STEP + 2):
        rows = global_batch(spec, step)
        batches = micro_batches(rows, layout.coordinates(rank)["dp"], layout.dp, spec.layout.micro_batch)
        told += notices.of(engine.train_step(step, 1e-3, batches).swapped, 1.0)
    return told


def job(engine: str = "megatron", **layout: Any) -> JobSpec:
    more = {"zero_stage": 1} if engine == "deepspeed" else {}
    # Deep enough that layers go while the last two stay.
    return small_job(small_model("mixtral", layers=4), {**layout, **more}, engine=engine, steps=5)


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_a_stage_tells_once_what_was_copied_and_what_the_link_would_hide(ranks: Ranks, engine: str) -> None:
    found = ranks.run(2, _told, job(engine, dp=2, offload_activations=0.5), None)
    assert not found[1]
    ((kind, message, data),) = found[0]
    assert kind == "activations_swapped"
    assert data["copied_bytes"] > 0
    assert data["link_bytes_per_second"] > 0
    assert data["layer_seconds"] > 0
    assert 0 <= data["hidden_fraction"] <= 1
    assert f"hides {data['hidden_fraction']:.0%} of tokens, of which 50% are swapped" in message


def test_what_finds_no_room_stays_and_is_told(ranks: Ranks) -> None:
    ((first, *more),) = ranks.run(1, _told, job(offload_activations=0.5), 1000.0)
    kind, message, data = first
    assert kind == "activations_stayed"
    assert data["left_bytes"] > 0
    assert "host memory has 0.000 GB a rank for them" in message
    assert not more


def test_whole_layers_computed_again_copy_their_inputs_alone(ranks: Ranks) -> None:
    (again,) = ranks.run(1, _told, job(offload_activations=0.0, recompute="full"), None)
    (swapped,) = ranks.run(1, _told, job(offload_activations=0.0), None)
    assert 0 < again[0][2]["copied_bytes"] < swapped[0][2]["copied_bytes"]


def test_memory_that_cannot_be_had_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    slab, asked = host_link.Slab(1e15, is_pinned=False), itertools.count()

    def refuse(descriptor: int, size: int) -> Any:
        raise OSError(f"request {next(asked)} of {size} bytes: cannot allocate memory")

    monkeypatch.setattr(host_link.mmap, "mmap", refuse)
    assert slab.take(4096) is None
    assert slab.take(4096) is None
    assert next(asked) == 1, "it is not asked for again"
