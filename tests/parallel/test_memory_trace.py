"""What is told of a step's memory by shorter steps: traces counted by hand, and steps that are then run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jobs.architecture import ModelArchitecture
from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy
from kernels.rehearsal import rehearsing, stands_for
from models.deepspeed_experts import group_experts
from models.deepspeed_swap import swap_layers
from models.reference import Context
from models.stages import Stage
from parallel import offload
from parallel.memory_forecast import Change, Trace, extrapolated, forecast, lengths_of, lifetimes, placed
from parallel.memory_plan import Request, aligned, most_alive
from parallel.memory_trace import allocator_changes, rehearse, tracing
from parallel.offload import Swap

CPU = torch.device("cpu")
SEQUENCE = 256


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sizes(trace: Trace) -> list[tuple[int, int, int]]:
    return [(one.size, one.first, one.last) for one in lifetimes(trace).requests]


def test_tensors_live_from_the_operation_that_makes_them_until_nothing_has_them() -> None:
    weight = torch.ones(100)
    with tracing(CPU) as trace:
        double = weight * 2  # asked for at 0
        view = double[:50].view(5, 10)
        power = view.exp()  # at 1
        del double, view  # at 2
        total = power.sum()  # at 3
        del power  # at 4
    assert trace.resident == 400
    assert sizes(trace) == [(400, 0, 1), (200, 1, 3), (4, 3, 4)]
    assert [one.name for one in lifetimes(trace).requests] == ["0 mul", "1 exp", "2 sum"]
    assert trace.peak == 400 + 512 + 512
    del total


def test_backward_keeps_what_it_reads() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with tracing(CPU) as trace:
        total = weight.sin().exp().sum()
        total.backward()
    made = {one.name.split()[1]: one for one in reversed(lifetimes(trace).requests)}
    assert made["sin"].last < made["sum"].first
    assert made["sum"].first < made["mul"].first == made["exp"].last, "the product reads it"
    assert made["cos"].first > made["exp"].last
    assert weight.grad is not None


def test_storages_resized_by_themselves_end_and_begin() -> None:
    with tracing(CPU) as trace:
        copies = torch.zeros(1000)
        copies.untyped_storage().resize_(0)
        copies.view(10, 100)
        other = torch.ones(10)
        copies.untyped_storage().resize_(4000)
        copies.fill_(1)
    assert [size for size, *_ in sizes(trace) if size] == [4000, 40, 4000]
    assert trace.peak <= 4000 + 96 + 512
    del other


def test_memory_of_others_is_not_seen_and_what_another_thread_gives_up_is() -> None:
    weight = torch.ones(100)
    with tracing(CPU) as trace:
        weight.mul_(torch.from_numpy(np.ones(100, np.float32)))
        held = [weight + 1]
        thread = Thread(target=held.clear)
        thread.start()
        thread.join()
        after = torch.ones(1)
    assert trace.resident == 400
    assert sizes(trace) == [(400, 0, 0), (4, 2, 2)]
    del after


def test_entries_of_an_allocator_are_changes() -> None:
    def entry(action: str, address: int, size: int) -> dict[str, Any]:
        return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": 1, "frames": []}

    entries = [
        entry("free_requested", 4096, 512),  # from before
        entry("free_completed", 4096, 512),
        entry("segment_alloc", 0, 2 << 20),
        entry("alloc", 0, 1000),
        entry("alloc", 1024, 100),
        entry("free_requested", 0, 1000),
        entry("alloc", 0, 300),
        entry("free_completed", 0, 1000),
        entry("snapshot", 0, 0),
    ]
    trace = Trace(2048, allocator_changes(entries))
    stays, requests = lifetimes(trace)
    assert stays == 1536
    assert requests == [Request("0", 1000, 1, 2), Request("1", 100, 2, 4), Request("2", 300, 4, 4)]
    assert trace.peak == 1536 + 1024 + 512


class Allocator:
    """Stands in for what torch tells of CUDA's, in the form of torch/cuda/memory.py: one tensor a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: list[dict[str, Any]] = []
        self.asked: list[Any] = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5000)
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self._record)
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"device_traces": [[], self.entries]})

    def _record(self, enabled: str | None, **options: Any) -> None:
        self.asked.append((enabled, options))
        self.entries = []

    def step(self, length: int) -> None:
        self.entries.append({"action": "alloc", "addr": 0, "size": 1024 * length})
        self.entries.append({"action": "free_requested", "addr": 0, "size": 1024 * length})


def test_a_gpu_is_rehearsed_by_its_allocators_history(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    found = rehearse(allocator.step, 64, 1, torch.device("cuda", 1))
    assert (found.resident, found.peak, found.notice) == (5000, 5000 + 64 * 1024, "")
    assert allocator.asked == [("all", {"context": None, "stacks": "python"}), (None, {})] * 3
    with pytest.raises(KeyError), tracing(torch.device("cuda", 1)):
        raise KeyError
    assert allocator.asked[-1] == (None, {})


def test_an_allocator_without_history_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("unexpected keyword")

    allocator = Allocator(monkeypatch)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", refuse)
    found = rehearse(allocator.step, 64, 1, torch.device("cuda", 1))
    assert (found.peak, found.notice) == (0, "torch's allocator keeps no history: TypeError('unexpected keyword')")
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", allocator._record)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"traces": []})
    found = rehearse(allocator.step, 64, 1, torch.device("cuda", 1))
    assert found.notice == "the history of torch's allocator is in another form: KeyError('device_traces')"


@pytest.mark.parametrize(
    ("known", "size", "is_average"),
    [
        ([7, 7, 7], 7, False),
        ([0, 0, 0], 0, False),
        ([20, 28, 36], 132, False),
        ([256, 576, 1024], 16384, False),  # scores of each token with each
        ([100, 160, 190], 800, True),  # rows that routing decides
        ([0, 30, 0], 53, True),
    ],
)
def test_sizes_are_continued_as_they_grow(known: list[int], size: int, is_average: bool) -> None:
    assert extrapolated([2, 3, 4], known, 16) == (size, is_average)


def test_rehearsals_are_short_and_whole_ones_of_what_is_short() -> None:
    assert lengths_of(131_072, 1) == [4096, 8192, 12288, 16384]
    assert lengths_of(1000, 8) == [32, 64, 96, 128]
    assert lengths_of(32, 8) == [8, 32]


def test_what_cannot_be_matched_is_told_by_its_peaks() -> None:
    def trace(count: int, length: int) -> Trace:
        return Trace(100, [Change(at, 512 * length) for at in range(count)])

    found = forecast([(2, trace(2, 2)), (3, trace(3, 3)), (4, trace(3, 4))], 32)
    assert found.requests == []
    assert found.peak == 100 + 512 * (12 + (12 - 4) // 2 * 28)
    assert found.notice == "steps of 2, 3, 4 tokens ask for memory 2, 3, 3 times, so that only their peaks are compared"


def test_a_plan_places_large_tensors_and_counts_the_others_together() -> None:
    large = [Request(f"large {at}", 10**6 * (at + 1), at, at + 2) for at in range(20)]
    small = [Request(f"small {at}", 600, at, at + 1) for at in range(20)]
    requests, plan = placed([*large, *small])
    assert {one.name for one in requests} == {one.name for one in large} | {"20 smaller ones"}
    assert plan.bound == most_alive([*large, *small]) <= plan.peak <= 1.01 * plan.bound
    for one, other in itertools.combinations(requests, 2):
        if one.first <= other.last and other.first <= one.last:
            low, high = sorted((one, other), key=lambda each: plan.addresses[each.name])
            assert plan.addresses[low.name] + aligned(low.size) <= plan.addresses[high.name]


def test_lengths_stand_for_others_only_in_rehearsals() -> None:
    with rehearsing(16.0):
        assert stands_for(100) == 1600
    assert stands_for(100) == 100


def a_step(kind: str, fraction: float | None) -> Callable[[int], None]:
    shape: dict[str, Any] = {"vocab": 64, "hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8}
    mixture: dict[str, Any] = {"experts": 4, "top_k": 2, "expert_ffn": 24, "aux_loss": 0.1, "z_loss": 0.01}
    model = ModelArchitecture(name=kind, ffn=48, **shape, **(mixture if kind == "mixture" else {}))
    torch.manual_seed(1)
    decoder = Stage(model, range(model.layers))
    group_experts(decoder, None)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    decoder.auxiliary_weight = 0.1
    if fraction is not None:
        swap_layers(decoder, Swap(CPU, fraction))
    tokens = torch.randint(model.vocab, (1, SEQUENCE + 1))

    def step(length: int) -> None:
        inputs, labels = tokens[:, :length], tokens[0, 1 : length + 1]
        decoder.contexts = iter((Context(torch.arange(length)[None]),))
        hidden: Tensor = decoder.run(inputs).flatten(0, 1)
        linear_cross_entropy(hidden, decoder.head_weight, labels, torch.ones(length)).backward()
        decoder.zero_grad(set_to_none=True)

    return step


@pytest.fixture
def _small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence is cut in several slices, and its logits in several chunks."""
    monkeypatch.setattr(offload, "SLICE", 64)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 64 * 64)


@pytest.mark.usefixtures("_small_runs")
@pytest.mark.parametrize("fraction", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_short_steps_tell_what_a_long_one_needs(kind: str, fraction: float | None) -> None:
    step = a_step(kind, fraction)
    found = rehearse(step, SEQUENCE, 1, CPU)
    step(SEQUENCE)
    with tracing(CPU) as trace:
        step(SEQUENCE)
    assert found.notice == ""
    assert len(found.requests) == sum(one.size > 0 for one in lifetimes(trace).requests)
    assert found.resident == trace.resident
    assert found.peak == pytest.approx(trace.peak, rel=0.03)
