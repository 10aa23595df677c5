"""Why a plan is what it is, other hardware, other shapes, and the timeline of a step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import InputError
from parallel.capabilities import why_refused
from parallel.estimates.hardware import Link, hardware
from parallel.estimates.memory import estimate_memory, stage_memory
from parallel.estimates.workload import Workload
from parallel.planning.budget import Budget
from parallel.planning.explanation import explain
from parallel.planning.planner import device_of, plan_job, resolve
from parallel.planning.quantities import count, quantity
from parallel.planning.shapes import sweep
from parallel.planning.timeline import timeline
from parallel.planning.what_if import changed, numbers


@settings(deadline=None, max_examples=8)
@given(
    model=st.sampled_from(["mixtral_8x7b", "llama3_8b", "qwen3_30b_a3b"]),
    nodes=st.sampled_from([1, 2, 4]),
    length=st.sampled_from([2048, 4096, 16384]),
    place=st.integers(0, 20),
)
def test_the_parts_sum_to_the_whole(make_job: Any, model: str, nodes: int, length: int, place: int) -> None:
    job = make_job(model, "h200_x8", {"etp": 1, "vpp": 1}, nodes=nodes, sequence_length=length, global_batch=64)
    plans = plan_job(job).plans
    plan = plans[place % len(plans)]
    found = explain(job, plan, device_of(job))
    assert sum(found.time.values()) == pytest.approx(plan.time.total)
    assert sum(found.memory.values()) == plan.memory.total
    assert list(found.time.values()) == sorted(found.time.values(), reverse=True)


def test_routing_is_told_apart(make_job: Any) -> None:
    job = make_job("mixtral_8x7b", "h100_x8", {"ep": 8}, nodes=4, global_batch=128)
    plan = plan_job(job).plans[0]
    balanced, natural, p99 = explain(job, plan, device_of(job)).routing
    assert natural.step_seconds == pytest.approx(plan.time.total)
    assert natural.p_out_of_memory == plan.p_out_of_memory
    assert balanced.step_seconds < natural.step_seconds < p99.step_seconds
    assert balanced.memory_bytes <= natural.memory_bytes <= p99.memory_bytes
    whole = make_job("mixtral_8x7b", "h100_x8", {"ep": 1}, nodes=4, global_batch=128)
    assert explain(whole, plan_job(whole).plans[0], device_of(whole)).routing == ()


def test_a_neighbour_is_what_planning_it_would_find(make_job: Any) -> None:
    job = make_job("mixtral_8x7b", "h100_x8", nodes=4, global_batch=128)
    plan, device = plan_job(job).plans[0], device_of(job)
    chosen = resolve(job, plan)
    seen = set()
    for neighbour in explain(job, plan, device).neighbours:
        changes = {name: after for name, _, after in neighbour.change}
        turned = chosen.model_copy(update={"layout": chosen.layout.model_copy(update=changes)})
        assert neighbour.change not in seen
        seen.add(neighbour.change)
        assert neighbour.obstacle == why_refused(turned)
        if neighbour.plan is None:
            continue
        if neighbour.missing_bytes:
            with pytest.raises(InputError, match="GiB a device"):
                plan_job(turned)
            roomy = replace(device, memory_bytes=device.memory_bytes + neighbour.missing_bytes)
        else:
            roomy = device
        (planned,) = plan_job(turned, roomy).plans
        # Only what a roomier device makes of the same memory differs.
        assert replace(planned, p_out_of_memory=neighbour.plan.p_out_of_memory) == neighbour.plan
        assert neighbour.seconds_gained == plan.time.total - planned.time.total
        assert planned.layout.world == 32
    knobs = {name for change in seen for name, _, _ in change}
    assert knobs >= {"tp", "cp", "dp", "pp", "ep", "etp", "micro_batch", "vpp", "recompute", "zero_stage", "dispatcher"}


def test_more_memory_would_allow_what_it_says(make_job: Any) -> None:
    job = make_job("mixtral_8x7b", "h100_x8", nodes=4, global_batch=256)
    plan, device = plan_job(job).plans[0], device_of(job)
    held_back = explain(job, plan, device).held_back
    assert held_back is not None
    assert held_back.plan is not None
    assert held_back.plan.time.total < plan.time.total
    changes = {name: after for name, _, after in held_back.change}
    turned = resolve(job, plan).model_copy(update={"layout": resolve(job, plan).layout.model_copy(update=changes)})
    enough = device.memory_bytes + held_back.missing_bytes
    (planned,) = plan_job(turned, replace(device, memory_bytes=enough)).plans
    assert replace(planned, p_out_of_memory=held_back.plan.p_out_of_memory) == held_back.plan
    with pytest.raises(InputError, match="GiB a device"):
        plan_job(turned, replace(device, memory_bytes=enough - 1))


def test_every_stage_is_estimated_and_the_fullest_is_the_estimate(make_job: Any) -> None:
    job = make_job("llama3_8b", "h100_x8")
    layout = next(plan.layout for plan in plan_job(job).plans if plan.layout.pp == 4)
    workload, device = Workload.of(job, layout, 1), device_of(job)
    stages = stage_memory(workload, device)
    assert len(stages) == 4
    assert max(stages, key=lambda stage: stage.total) == estimate_memory(workload, device)
    assert [stage.activations for stage in stages] == sorted((stage.activations for stage in stages), reverse=True)


# Other hardware.


def test_a_what_if_changes_one_number() -> None:
    device = hardware("h100", 8)
    assert changed(device, []) == device
    assert changed(device, ["hardware.memory=141GB"]).memory_bytes == 141 * 10**9
    assert changed(device, ["hardware.memory_bytes=1e9"]).memory_bytes == 10**9
    assert changed(device, ["hardware.memory=4TB/s"]).memory_bytes_per_second == 4e12
    assert changed(device, ["hardware.peak_bf16=1PFLOP/s"]).peak_bf16_flops == 1e15
    both = changed(device, ["hardware.host_link=64GB/s", "hardware.host_link=5us"]).host_link
    assert (both.bytes_per_second, both.latency_seconds) == (64e9, pytest.approx(5e-6))
    for name, value in numbers(device):
        if value is not None:
            assert dict(numbers(changed(device, [f"hardware.{name}=7"]))) == dict(numbers(device)) | {name: 7}


@pytest.mark.parametrize(
    ("assumption", "shown"),
    [
        ("memory=1GB", "--what-if=memory=1GB: has the form hardware.FIELD=VALUE"),
        ("hardware.memory", "--what-if=hardware.memory: has the form hardware.FIELD=VALUE"),
        ("hardware.memory=lots", "hardware.memory=lots: is a number with a unit"),
        ("hardware.memory_byte=1GB", "nearest valid: hardware.memory_bytes"),
        ("hardware.memory_bytes=3s", "hardware.memory_bytes=3s: memory_bytes is a number of bytes, not of seconds"),
        ("hardware.memory=0GB", "hardware.memory=0GB: is above 0"),
    ],
)
def test_what_if_refuses(assumption: str, shown: str) -> None:
    with pytest.raises(InputError) as caught:
        changed(hardware("h100", 8), [assumption])
    assert shown in str(caught.value)


def test_more_memory_plans_more_layouts(make_job: Any) -> None:
    job = make_job("mixtral_8x7b", "h100_x8", nodes=2)
    more = changed(device_of(job), ["hardware.memory=141GB"])
    here, there = plan_job(job).plans, plan_job(job, more).plans
    assert {plan.layout for plan in here} < {plan.layout for plan in there}
    assert there[0].time.total <= here[0].time.total


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("141GB", 141e9, "bytes"),
        ("80GiB", 80 * 2**30, "bytes"),
        ("1.5TB/s", 1.5e12, "bytes_per_second"),
        ("989.5TFLOP/s", 989.5e12, "flops"),
        ("5us", 5e-6, "seconds"),
        ("2s", 2, "seconds"),
        ("7", 7, ""),
        ("1e9", 1e9, ""),
    ],
)
def test_quantities(text: str, value: float, unit: str) -> None:
    found = quantity("x", text)
    assert (found.value, found.unit) == (pytest.approx(value), unit)


def test_counts() -> None:
    assert [count("x", text) for text in ("1T", "300B", "2.5", "1e3")] == [1e12, 300e9, 2.5, 1000]
    for text in ("", "0", "-1", "1X", "T", "1GB"):
        with pytest.raises(InputError, match="is a number above 0"):
            count("x", text)


# Tokens and shapes.


def test_days_and_cost_follow_from_the_speed(make_job: Any) -> None:
    plan = plan_job(make_job("llama3_8b", "h100_x8")).plans[0]
    budget = Budget.of("1T", "2.5")
    assert budget is not None
    assert budget.days(plan) * 86400 * plan.tokens_per_second == pytest.approx(1e12)
    assert budget.cost(plan, 8) == pytest.approx(budget.days(plan) * 24 * 8 * 2.5)
    assert Budget(1e12).cost(plan, 8) is None
    with pytest.raises(InputError, match="give --tokens too"):
        Budget.of(None, "2.5")


def test_shapes_of_about_equal_size_are_ranked(make_job: Any) -> None:
    job = make_job("qwen3_30b_a3b", "h100_x8", nodes=4, global_batch=128)
    ranges = ["model.hidden=1024,2048", "model.experts=64,128,256", "model.expert_ffn=384,768"]
    shapes = sweep(job, ranges, device_of(job))
    assert len(shapes) == 12
    planned = [shape.plan.tokens_per_second for shape in shapes if shape.plan]
    assert planned == sorted(planned, reverse=True)
    assert [bool(shape.plan) for shape in shapes] == [True] * len(planned) + [False] * (12 - len(planned))
    own = next(shape for shape in shapes if list(shape.values.values()) == ["2048", "128", "768"])
    assert own.plan == plan_job(job).plans[0]
    for shape in shapes:
        assert shape.parameters is not None
        near = abs(shape.parameters / job.model.parameters - 1) <= 0.05
        assert near == (shape.plan is not None), shape
        assert near or "of the job's" in (shape.reason or "")


def test_values_that_make_no_model_are_left_out(make_job: Any) -> None:
    job = make_job("llama3_8b", "h100_x8")
    wrong, right = sorted(sweep(job, ["model.kv_heads=5,8"], device_of(job)), key=lambda shape: shape.plan is not None)
    assert (wrong.parameters, wrong.reason) == (None, "kv_heads=5 does not divide heads=32")
    assert right.plan == plan_job(job).plans[0]


@pytest.mark.parametrize(
    ("ranges", "shown"),
    [
        (["hidden=1,2"], "--sweep=hidden=1,2: is no key of a model's shape; nearest valid: model.hidden"),
        (["model.hiden=1"], "nearest valid: model.hidden"),
        (["model.hidden="], "names no values"),
        (["model.hidden=wide"], "model.hidden=wide: "),
        (["model.layers=2,4"], "no shape has a plan: layers=4: "),
    ],
)
def test_a_sweep_that_cannot_be(make_job: Any, ranges: list[str], shown: str) -> None:
    job = make_job("llama3_8b", "h100_x8")
    with pytest.raises(InputError) as caught:
        sweep(job, ranges, device_of(job))
    assert shown in str(caught.value)


# The timeline.


@settings(deadline=None)
@given(stages=st.integers(1, 6), chunks=st.integers(1, 4), groups=st.integers(1, 4))
def test_a_timeline_is_a_schedule(stages: int, chunks: int, groups: int) -> None:
    micro_batches = groups * stages if chunks > 1 else groups
    boxes = timeline(stages, chunks, micro_batches, 1.0, 2.0)
    ends = {(box.kind, box.micro_batch, box.chunk * stages + box.stage): box.end for box in boxes}
    assert len(ends) == len(boxes) == 2 * stages * chunks * micro_batches
    for box in boxes:
        place = box.chunk * stages + box.stage
        before = ("forward", box.micro_batch, place - 1)
        if box.kind == "backward":
            last = place == stages * chunks - 1
            before = ("forward", box.micro_batch, place) if last else ("backward", box.micro_batch, place + 1)
        assert box.start >= ends.get(before, 0.0)
    for stage in range(stages):
        mine = sorted((box for box in boxes if box.stage == stage), key=lambda box: box.start)
        assert all(one.end <= other.start for one, other in pairwise(mine))
    if chunks == 1 or stages > 1:
        assert max(ends.values()) == pytest.approx(3 * (micro_batches * chunks + stages - 1))


def test_swapped_activations_are_a_change_and_their_time_is_told(make_job: Any) -> None:
    shape = {"sequence_length": 131072, "global_batch": 8}
    job = make_job("llama3_8b", "h200_x8", {"dp": 8}, **shape)
    device = device_of(job)
    plan = plan_job(job).plans[0]
    assert plan.options["recompute"] != "none"
    labels = {each.label: each for each in explain(job, plan, device).neighbours}
    (label,) = (each for each in labels if each.startswith("offload_activations null -> auto, recompute "))
    assert labels[label].obstacle is None
    swapped = make_job("llama3_8b", "h200_x8", {"dp": 8, "offload_activations": 0.0}, **shape)
    at = plan_job(swapped).plans[0]
    found = explain(swapped, at, device)
    assert found.time["recomputed"] > 0
    assert sum(found.time.values()) == pytest.approx(at.time.total)
    (back,) = (each for each in found.neighbours if each.label == "offload_activations 0 -> null")
    assert back.seconds_gained > 0
    slow = replace(device, host_link=Link(0.0, 1e9))
    assert explain(swapped, plan_job(swapped, slow).plans[0], slow).time["stall"] > 0
