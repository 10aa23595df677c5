"""The fraction of tokens that is swapped, beside a pipeline of copies played out copy by copy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import InputError
from parallel.estimates.activations import layer_bytes
from parallel.estimates.workload import Workload
from parallel.layout import Layout
from parallel.swap import Host, Layers, Skeletal, SwapPlan, plan_swap, skeletal, swap_layers

ROOMY = Host(bytes_per_second=50e9, link_ranks=1, memory_bytes=1e15, memory_ranks=8)
SIZES = st.builds(Skeletal, *[st.integers(1, 10**9).map(float)] * 3)


def stall(copied: float, number: int, seconds: float, bandwidth: float, flying: int) -> float:
    """Seconds that a stage waits for copies, all of its layers alike.

    It alternates, in the steady state, between the forward of one micro-batch and the backward, twice as long, of the
    oldest. A layer made is copied out; a buffer is free once its copy out, or backward of its layer, has ended. A layer
    that backward reads is copied in as soon as a buffer is free, in the order in which backward wants them.
    """
    alone = flying == 1
    copy = copied / bandwidth
    free = [0.0] * (2 if alone else 3)  # when each buffer is
    now = waited = out = back = 0.0
    held: dict[tuple[int, int], tuple[float, int]] = {}  # on the device: since when, in which buffer

    def forward(batch: int, layer: int) -> None:
        nonlocal now, waited, out
        buffer = min(range(len(free)), key=free.__getitem__)
        begin = max(now, free[buffer])
        waited += begin - now
        now = begin + seconds
        if alone and layer >= number - 2:
            held[batch, layer] = now, buffer
            free[buffer] = float("inf")
        else:
            out = max(now, out) + copy
            free[buffer] = out

    def fetch(batch: int, layer: int) -> None:
        nonlocal back
        buffer = min(range(len(free)), key=free.__getitem__)
        back = max(free[buffer], back) + copy
        held[batch, layer] = back, buffer
        free[buffer] = float("inf")

    def backward(batch: int, layer: int) -> None:
        nonlocal now, waited
        since, buffer = held.pop((batch, layer))
        begin = max(now, since)
        waited += begin - now
        now = begin + 2 * seconds
        free[buffer] = now

    for batch in range(flying + 2):
        for layer in range(number):
            # While the last layer is made, the first that backward reads is fetched into the third buffer.
            if not alone and layer == number - 1 and batch >= flying - 1:
                fetch(batch - flying + 1, number - 1)
            forward(batch, layer)
        oldest = batch - flying + 1
        if oldest < 0:
            continue
        for layer in reversed(range(number)):
            if not alone and layer:
                fetch(oldest, layer - 1)
            backward(oldest, layer)
            if alone and layer >= 2:
                fetch(oldest, layer - 2)
    return waited


@given(SIZES, st.integers(3, 12), st.floats(1e-3, 1.0), st.floats(1e8, 1e12), st.integers(1, 4))
def test_at_alpha_nothing_waits_and_a_little_more_does(
    kept: Skeletal, number: int, seconds: float, bandwidth: float, flying: int
) -> None:
    plan = swap_layers([Layers(number, kept, seconds)], flying, replace(ROOMY, bytes_per_second=bandwidth))
    (layer,) = plan.layers
    stalled = stall(layer.copied, number, seconds, bandwidth, flying)
    if layer.slack_seconds < -1e-9 * seconds:
        assert plan.alpha == 0
        assert plan.limit == "link"
        assert "of stall" in plan.notice
        assert stalled > 0 or (number == 3 and flying == 1)
    else:
        assert stalled <= 1e-6 * seconds
        assert plan.notice == "" or kept.mandatory == pytest.approx(bandwidth * seconds)
    # Of three layers alone in flight one is copied, beside another's forward, and nobody wants its buffer.
    if plan.limit == "link" and plan.alpha > 0 and (number > 3 or flying > 1):
        assert stall(layer.copied + 0.01 * bandwidth * seconds, number, seconds, bandwidth, flying) > 0


@given(
    SIZES,
    st.integers(1, 40),
    st.integers(1, 8),
    st.floats(1e-3, 1.0),
    st.floats(1e8, 1e12),
    st.floats(1e9, 1e13),
    st.floats(1.0, 10.0),
)
def test_alpha_grows_with_link_time_and_memory(
    kept: Skeletal, number: int, flying: int, seconds: float, bandwidth: float, memory: float, more: float
) -> None:
    def at(seconds: float, bandwidth: float, memory: float) -> SwapPlan | None:
        host = Host(bandwidth, 1, memory, 1)
        try:
            return swap_layers([Layers(number, kept, seconds)], flying, host)
        except InputError:
            return None

    plan = at(seconds, bandwidth, memory)
    others = [at(seconds * more, bandwidth, memory), at(seconds, bandwidth * more, memory)]
    others.append(at(seconds, bandwidth, memory * more))
    if plan is None:
        assert others[:2] == [None, None]
        return
    assert 0 <= plan.alpha <= 1
    assert all(other is not None and other.alpha >= plan.alpha for other in others)
    (layer,) = plan.layers
    assert layer.mandatory + layer.swapped + layer.recomputed == pytest.approx(kept.total)
    assert plan.host_bytes <= memory * (1 + 1e-9)
    hosted = number * flying if flying > 1 else max(0, number - 2)
    assert plan.host_bytes == pytest.approx(hosted * layer.copied)
    assert (plan.limit == "nothing") == (plan.alpha == 1)


def test_the_closed_form_by_hand() -> None:
    kept = Skeletal(1e9, 1e9, 14e9)
    link = swap_layers([Layers(10, kept, 0.2)], 1, Host(90e9, 2, 8e12, 8))
    assert link.alpha == pytest.approx((45e9 * 0.2 - 2e9) / 14e9)
    assert link.limit == "link"
    host = swap_layers([Layers(10, kept, 0.2)], 1, Host(90e9, 2, 320e9, 8))
    assert host.alpha == pytest.approx((40e9 / 8 - 2e9) / 14e9)
    assert (host.limit, host.host_bytes) == ("host", pytest.approx(40e9))
    both = swap_layers([Layers(10, kept, 1.0)], 3, Host(90e9, 2, 8e12, 8))
    assert (both.alpha, both.limit, both.host_bytes) == (1, "nothing", 30 * 16e9)
    slow = swap_layers([Layers(10, kept, 0.04)], 1, Host(90e9, 2, 8e12, 8))
    assert slow.alpha == 0
    assert slow.layers[0].slack_seconds == pytest.approx(0.04 - 2 / 45)
    assert slow.notice == (
        "2,000,000,000 bytes of each layer take 0.0444 s at 45,000,000,000 bytes a second, its forward 0.04 s: "
        "0.00444 s of stall"
    )


def test_memory_that_does_not_hold_what_is_mandatory() -> None:
    with pytest.raises(InputError) as caught:
        swap_layers([Layers(10, Skeletal(1e9, 1e9, 14e9), 0.2)], 1, Host(90e9, 2, 100e9, 8))
    assert str(caught.value) == (
        "host.memory_bytes=100000000000.0: inputs and attention outputs of 8 layers take 16,000,000,000 bytes a rank, "
        "each of 8 ranks has 12,500,000,000; nearest valid: 128000000000"
    )


@given(SIZES, st.integers(1, 40), st.integers(2, 8), st.integers(1, 8))
def test_the_memory_named_as_nearest_holds_it(kept: Skeletal, number: int, flying: int, ranks: int) -> None:
    host = Host(50e9, 1, 0.0, ranks)
    with pytest.raises(InputError) as caught:
        swap_layers([Layers(number, kept, 1.0)], flying, host)
    nearest = caught.value.nearest
    assert isinstance(nearest, int)
    swap_layers([Layers(number, kept, 1.0)], flying, replace(host, memory_bytes=nearest))
    with pytest.raises(InputError, match=r"host\.memory_bytes="):
        swap_layers([Layers(number, kept, 1.0)], flying, replace(host, memory_bytes=nearest - 2))


def test_two_layers_never_leave_the_device() -> None:
    plan = swap_layers([Layers(2, Skeletal(1e9, 1e9, 14e9), 1e-3)], 1, Host(1e9, 8, 0.0, 8))
    assert (plan.alpha, plan.limit, plan.host_bytes, plan.notice) == (1, "nothing", 0, "")


def test_kinds_share_memory_and_the_slower_copy_decides() -> None:
    dense, moe = Skeletal(1e9, 1e9, 4e9), Skeletal(1e9, 1e9, 20e9)
    plan = swap_layers([Layers(3, dense, 0.1), Layers(7, moe, 0.2)], 1, Host(40e9, 1, 1e15, 1))
    assert plan.alpha == pytest.approx((40e9 * 0.2 - 2e9) / 20e9)
    assert plan.host_bytes == pytest.approx(8 * 2e9 + plan.alpha * (3 * 4e9 + 5 * 20e9))
    few = swap_layers([Layers(3, dense, 0.1), Layers(1, moe, 0.2)], 1, Host(40e9, 1, 1e15, 1))
    assert few.host_bytes == pytest.approx(2 * 2e9 + few.alpha * 2 * 4e9)


@pytest.mark.parametrize("name", ["llama3_8b", "mixtral_8x7b", "deepseek_v3", "qwen3_30b_a3b"])
@pytest.mark.parametrize("degrees", [{}, {"tp": 2}, {"cp": 2}, {"tp": 2, "cp": 2, "dp": 2, "ep": 4}])
def test_the_parts_are_all_that_a_layer_keeps(make_job: Any, name: str, degrees: dict[str, int]) -> None:
    if name == "llama3_8b":
        degrees = degrees | {"ep": 1}
    step = Workload.of(make_job(name, "h200_x8"), Layout(**degrees), 1)
    joined = replace(step, own_kernels=False)  # what is swapped is not part of a tensor that others keep
    for moe in (False, True) if step.model.is_moe and step.model.dense_layers else (step.model.is_moe,):
        assert skeletal(step, moe).total == pytest.approx(layer_bytes(joined, moe).kept)
        assert min(vars(skeletal(step, moe)).values()) > 0


def test_sizes_of_a_dense_layer_by_hand(make_job: Any) -> None:
    # 4,096 tokens of Llama 3 8B: hidden 4,096, 32 heads and 8 of keys of 128, feed-forward 14,336, bf16.
    step = Workload.of(make_job("llama3_8b", "h200_x8"), Layout(tp=2), 1)
    kept, tokens = skeletal(step, moe=False), 4096
    assert kept.layer_input == 2 * tokens * 4096 / 2
    assert kept.attention == (2 * 4096 + 4 * 32) * tokens / 2
    # The middle residual, two norms' outputs, query, key and value, and SwiGLU's gate, up and product.
    assert kept.rest == 2 * tokens * (3 * 4096 + 4096 + 2 * 1024 + 3 * 14336) / 2


def test_most_rows_are_all_that_one_rank_can_be_sent(make_job: Any) -> None:
    layout = Layout(dp=8, ep=8)
    step = Workload.of(make_job("qwen3_30b_a3b", "h200_x8"), layout, 1)
    usual, most = (skeletal(step, True, rows) for rows in ("expected", "most"))
    assert (usual.layer_input, usual.attention) == (most.layer_input, most.attention)
    assert most.rest > 3 * usual.rest
    host = Host(55e9, 1, 2e12, 8)
    usual_plan, most_plan = (plan_swap(step, 0, host, 0.0, 5e-3, rows) for rows in ("expected", "most"))
    assert most_plan.alpha < usual_plan.alpha


def test_earlier_stages_hold_more_micro_batches(make_job: Any) -> None:
    step = Workload.of(make_job("llama3_8b", "h200_x8", global_batch=16), Layout(pp=4), 1)
    plans = [plan_swap(step, stage, ROOMY, 1.0) for stage in range(4)]
    each = [plan.host_bytes / plan.layers[0].copied for plan in plans]
    assert each == pytest.approx([4 * 8, 3 * 8, 2 * 8, 8 - 2])
    interleaved = plan_swap(step.at(Layout(pp=4, vpp=2), 1), 0, ROOMY, 1.0)
    assert interleaved.host_bytes / interleaved.layers[0].copied == pytest.approx((2 * 3 + 4 + 1) / 2 * 8)


def test_of_whole_layers_computed_again_their_inputs_go(make_job: Any) -> None:
    step = replace(Workload.of(make_job("llama3_8b", "h200_x8"), Layout(), 1), recompute=frozenset({"layer"}))
    assert skeletal(step, moe=False) == Skeletal(2 * 4096 * 4096, 0.0, 0.0)
    assert plan_swap(step, 0, ROOMY, 1.0).host_bytes == 30 * 2 * 4096 * 4096
