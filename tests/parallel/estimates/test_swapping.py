"""Swapped activations as plans price them, beside what was measured and what `parallel.offload` does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.spec import LayoutSpec
from models.deepspeed_swap import swap_layers
from models.reference import Context, Layer
from parallel import offload
from parallel.estimates.costs import estimate_time, least_time
from parallel.estimates.hardware import Hardware, Link, hardware
from parallel.estimates.memory import MemoryEstimate, estimate_memory
from parallel.estimates.stages import kinds
from parallel.estimates.swapping import (
    ALONE,
    BESIDE_OTHERS,
    HOST_SHARE,
    copy_seconds,
    forward_seconds,
    hosted_bytes,
    notices,
    settled,
)
from parallel.estimates.workload import Swapping, Workload
from parallel.layout import Layout
from parallel.offload import Swap

MEASURED = json.loads((Path(__file__).parents[3] / "docs" / "benchmarks" / "offload-h200.json").read_text())
LLAMA_2_7B = {"layers": 5, "kv_heads": 32, "ffn": 11008, "vocab": 32000}
H200 = hardware("h200", 8)


def step_of(
    make_job: Any, name: str = "llama3_8b", layout: Layout | None = None, micro_batch: int = 1, **job: Any
) -> Any:
    return Workload.of(make_job(name, "h200_x8", **job), layout or Layout(), micro_batch)


def swapped(step: Workload, share: Any, *, leaves: bool = True) -> Workload:
    return replace(step, swapping=Swapping(share, leaves))


def passing(memory: MemoryEstimate) -> int:
    return memory.activations + memory.logits + memory.workspace


def with_host(device: Hardware, bytes_per_second: float, memory: float) -> Hardware:
    return replace(device, host_link=Link(0.0, bytes_per_second), host_memory_bytes=round(memory))


def share_at(step: Workload, device: Hardware) -> float | None:
    swapping = settled(step, device).swapping
    assert swapping is None or swapping.share != "auto"
    return swapping and swapping.share


SHARES = {f"swapped, {share:.0%} of tokens": share for share in (1.0, 0.75, 0.0)}


@pytest.mark.parametrize("way", ["layers recomputed", *SHARES])
def test_what_was_measured_on_an_h200(make_job: Any, way: str) -> None:
    """Five layers of Llama 2 7B, 131,072 tokens: peaks beside weights, and steps over those with all kept."""
    kept = step_of(make_job, model_changes=LLAMA_2_7B, sequence_length=131072, global_batch=1)
    rows = {row["way"]: row["seconds"] for row in MEASURED["results"]}
    if way == "layers recomputed":
        asked = replace(kept, recompute=frozenset({"layer"}))
    else:
        asked = swapped(kept, SHARES[way])
        (row,) = (row for row in MEASURED["results"] if row["way"] == way)
        (kind,) = kinds(asked)
        assert hosted_bytes(asked, 0, kind.stage) == pytest.approx(row["swapped_bytes"], rel=1e-3)
    for name, step in {"all kept": kept, way: asked}.items():
        assert passing(estimate_memory(step, H200)) == pytest.approx(rows[name]["peak_bytes"], rel=0.045)
    times = [estimate_time(step, H200) for step in (kept, asked)]
    before, after = (time.total - time.optimizer - time.fixed for time in times)
    assert after / before == pytest.approx(rows[way]["median"] / rows["all kept"]["median"], rel=0.015)
    assert times[1].stall == 0


@pytest.mark.parametrize("flying", [1, 2, 3])
def test_as_many_layers_are_on_the_device_as_are_counted(
    make_job: Any, monkeypatch: pytest.MonkeyPatch, flying: int
) -> None:
    """1F1B of `flying` micro-batches over six layers: most whose activations are here when one's backward begins."""
    model = make_job("quickstart", model_changes={"layers": 6}).model
    stage = torch.nn.ModuleList(Layer(model, index) for index in range(6))
    swap = Swap(torch.device("cpu"), 0.5)
    swap_layers(stage, swap)
    context, most, returned = Context(torch.arange(16)[None]), 0, swap.returned

    def look(visit: offload.Visit) -> None:
        nonlocal most
        returned(visit)
        most = max(most, 1 + sum(other._is_here for other in swap._visits.values()))

    monkeypatch.setattr(swap, "returned", look)

    def forward() -> torch.Tensor:
        hidden = torch.randn(1, 16, model.hidden, requires_grad=True)
        for layer in stage:
            hidden, _ = layer(hidden, context)
        return hidden.sum()

    for _ in range(2):  # the first is to learn the order from
        most = 0
        queue = [forward() for _ in range(flying - 1)]
        for _ in range(3):
            queue.append(forward())
            queue.pop(0).backward()
        while queue:
            queue.pop(0).backward()
    assert most == (ALONE if flying == 1 else BESIDE_OTHERS)


@given(
    st.sampled_from(["llama3_8b", "mixtral_8x7b", "qwen3_30b_a3b"]),
    st.sampled_from([{}, {"tp": 2}, {"cp": 2, "dp": 2}, {"pp": 4}, {"pp": 2, "vpp": 2, "dp": 2}]),
    st.sampled_from([2048, 16384, 131072]),
    st.floats(1e9, 1e12),
    st.floats(1e9, 1e12),
    st.floats(1.0, 10.0),
)
def test_more_bandwidth_or_host_memory_never_lessens_the_share(
    make_job: Any, name: str, degrees: dict[str, int], length: int, bandwidth: float, memory: float, more: float
) -> None:
    step = swapped(step_of(make_job, name, Layout(**degrees), sequence_length=length), "auto")
    share = share_at(step, with_host(H200, bandwidth, memory))
    others = [with_host(H200, bandwidth * more, memory), with_host(H200, bandwidth, memory * more)]
    for other in (share_at(step, device) for device in others):
        assert share is None or (other is not None and other >= share)
    if share is not None:
        device = with_host(H200, bandwidth, memory)
        at = settled(step, device)
        assert max(hosted_bytes(at, kind.first, kind.stage) for kind in kinds(at)) <= HOST_SHARE * memory * (1 + 1e-6)
        if share > 0 and not step.model.is_moe:  # of two kinds of layers the other's forward may be the shorter
            assert copy_seconds(at, device, False) <= forward_seconds(at, device)[0] * (1 + 1e-9)


@given(
    st.sampled_from(["llama3_8b", "mixtral_8x7b", "qwen3_30b_a3b"]),
    st.sampled_from([{}, {"tp": 2}, {"cp": 2, "dp": 2}, {"pp": 4}, {"pp": 2, "vpp": 2, "dp": 2}]),
    st.sampled_from([2048, 16384, 131072]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(1e9, 1e12),
    st.floats(1e9, 1e13),
)
def test_swapping_frees_memory_and_costs_time(
    make_job: Any,
    name: str,
    degrees: dict[str, int],
    length: int,
    one: float,
    other: float,
    bandwidth: float,
    memory: float,
) -> None:
    kept = step_of(make_job, name, Layout(**degrees), sequence_length=length)
    device = with_host(H200, bandwidth, memory)
    less, more = (swapped(kept, share) for share in sorted((one, other)))
    found = [estimate_memory(step, device) for step in (less, more, kept)]
    roomy = replace(device, host_memory_bytes=10**15)
    assert estimate_memory(less, roomy).activations <= estimate_memory(more, roomy).activations
    assert max(found[0].activations, found[1].activations) <= found[2].activations
    times = [estimate_time(step, device) for step in (less, more, kept)]
    assert min(times[0].total, times[1].total) >= times[2].total * (1 - 1e-9)
    assert times[0].recomputed >= times[1].recomputed >= times[2].recomputed == 0
    assert times[0].stall <= times[1].stall
    assert estimate_time(more, with_host(H200, 2 * bandwidth, memory)).stall <= times[1].stall
    for step, time in zip((less, more, kept), times, strict=True):
        assert least_time(step, device) <= time.total


def test_a_stall_by_hand(make_job: Any) -> None:
    """Ten dense layers alone: eight are copied, each beside one forward and one backward."""
    step = swapped(step_of(make_job, model_changes={"layers": 10}, global_batch=1), 0.0)
    slow = with_host(H200, 1e9, 1e12)
    copy = (2 * 4096 * 4096 * 2 + 4 * 4096 * 32) / 1e9
    (forward, _) = forward_seconds(step, slow)
    time = estimate_time(step, slow)
    layers = [
        estimate_time(replace(step, model=step.model.model_copy(update={"layers": number})), H200).compute
        for number in (10, 11)
    ]
    again = estimate_time(step, slow).recomputed / 10
    backward = layers[1] - layers[0] - forward + again
    assert copy > backward > forward
    assert time.stall == pytest.approx(8 * (2 * copy - forward - backward), rel=0.02)


def test_layers_that_find_no_room_stay(make_job: Any) -> None:
    step = swapped(step_of(make_job, sequence_length=32768, global_batch=1), 0.5)
    (kind,) = kinds(step)
    needed = hosted_bytes(step, 0, kind.stage)
    roomy, half, none = (
        estimate_memory(step, with_host(H200, 5e10, room / HOST_SHARE)).activations
        for room in (1.01 * needed, 0.5 * needed, 1.0)
    )
    assert half - roomy == pytest.approx(needed / 2, rel=0.15)
    assert roomy < half < none < estimate_memory(replace(step, swapping=None), H200).activations


def test_where_the_host_is_the_device_only_what_is_computed_again_is_saved(make_job: Any) -> None:
    step = step_of(make_job, sequence_length=32768, global_batch=1)
    at = swapped(step, 0.5, leaves=False)
    (kind,) = kinds(at)
    apart = estimate_memory(swapped(step, 0.5), H200).activations
    assert estimate_memory(at, H200).activations == pytest.approx(apart + hosted_bytes(at, 0, kind.stage))


def test_whole_layers_computed_again_may_leave_their_inputs(make_job: Any) -> None:
    full = replace(step_of(make_job, sequence_length=131072, global_batch=1), recompute=frozenset({"layer"}))
    for share in (0.0, "auto"):
        step = swapped(full, share)
        assert share_at(step, H200) == 0
        memory, time = estimate_memory(step, H200), estimate_time(step, H200)
        assert memory.activations == 3 * 2 * 131072 * 4096
        assert memory.total < estimate_memory(swapped(replace(full, recompute=frozenset()), 0.0), H200).total
        assert (time.recomputed, time.stall) == (0, 0)
        assert time.total == estimate_time(full, H200).total


def test_what_must_be_known_is_told_with_the_numbers(make_job: Any) -> None:
    step = step_of(make_job, sequence_length=4096, global_batch=1)
    assert notices(step, H200) == []
    assert notices(swapped(step, 0.5, leaves=False), with_host(H200, 1e9, 1)) == []
    assert notices(swapped(step, 0.0), with_host(H200, 1e11, 1e12)) == []
    # Thirty layers of 67.6 MB each.
    (none,) = notices(swapped(step, "auto"), with_host(H200, 1e11, 2e9))
    assert none == (
        "layout.offload_activations=auto: all activations stay: what goes to the host in any case takes 2.03 GB a "
        "rank, and host memory has 1.60 GB for each"
    )
    assert settled(swapped(step, "auto"), with_host(H200, 1e11, 2e9)).swapping is None
    (short,) = notices(swapped(step, 0.0), with_host(H200, 1e11, 2e9))
    assert short == (
        "layout.offload_activations=0.0: 2.03 GB a rank go to the host, whose memory has 1.60 GB for each: layers that "
        "find no room stay on the device"
    )
    (unknown,) = notices(swapped(step, 0.0), with_host(H200, 1e11, 0))
    assert unknown == "layout.offload_activations=0.0: 2.03 GB of host memory a rank are wanted, and h200 tells of none"
    slow = with_host(H200, 1e9, 1e12)
    assert share_at(swapped(step, "auto"), slow) == 0
    for share in (0.0, "auto"):
        (stall,) = notices(swapped(step, share), slow)
        assert stall == (
            f"layout.offload_activations={share}: a dense layer's 67.6 MB take 67.63 ms over the link, and the next "
            f"layer's forward, which hides it, {forward_seconds(step, slow)[0] * 1e3:,.2f} ms"
        )


@pytest.mark.parametrize("share", [None, "auto", 0, 0.5, 1.0])
def test_a_share_is_auto_null_or_from_0_to_1(share: Any) -> None:
    assert LayoutSpec(offload_activations=share).offload_activations == share


@pytest.mark.parametrize("share", ["some", "0.5", -0.1, 1.01, float("nan"), True, [0.5]])
def test_what_is_no_share(share: Any) -> None:
    with pytest.raises(ValueError, match="is auto, null or a share from 0 to 1"):
        LayoutSpec(offload_activations=share)
