"""What sharing experts is said to make of uneven routing: no more than copies, memory and the link can."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.estimates.copies import assumed, copies_bytes, limits_of
from parallel.estimates.costs import estimate_time
from parallel.estimates.hardware import hardware, shipped_text
from parallel.estimates.loads import LOADS
from parallel.estimates.memory import estimate_memory
from parallel.estimates.workload import Workload
from parallel.fssdp import Limits
from parallel.fssdp_means import unshared
from parallel.layout import Layout
from parallel.planning.explanation import explain
from parallel.planning.planner import device_of, plan_job


def routed(make_job, **changes):
    options = {"expert_parallelism": "fssdp"}
    job = make_job("qwen3_30b_a3b", "h200_x8", options, sequence_length=4096, model_changes={"vocab": 1024})
    return replace(Workload.of(job, Layout(dp=8, ep=8), 2), **changes)


@given(
    ranks=st.sampled_from((2, 4, 8, 16, 64)),
    each=st.sampled_from((1, 2, 4, 16)),
    load=st.floats(1.0, 1.9),
    slots=st.integers(0, 4),
    movable=st.integers(0, 8),
)
def test_copies_never_make_the_busiest_busier(ranks: int, each: int, load: float, slots: int, movable: int) -> None:
    found = assumed(ranks * each, ranks, load, Limits(slots, movable))
    assert 1 - 1e-9 <= found.busiest <= max(load, 1.0) + 1e-6
    assert found.moved <= movable
    assert found.copies <= ranks * slots
    if min(slots, movable) == 0:
        assert found.busiest == pytest.approx(load, abs=1e-6)


@pytest.mark.parametrize("load", list(LOADS.values()))
def test_with_memory_and_a_link_all_ranks_have_about_the_same(load: float) -> None:
    assert assumed(128, 8, load, Limits(4, 8)).busiest <= 1.05
    assert assumed(256, 64, load, Limits(4, 8)).busiest <= 1.1


def test_even_routing_costs_at_most_two_percent_more_and_uneven_gains(make_job) -> None:
    device = hardware("h200", 8)
    for load, least, most in (("balanced", 0.98, 1.0), ("natural", 1.02, 1.3), ("p99", 1.1, 1.7)):
        plain, sharing = (
            estimate_time(routed(make_job, load=load, expert_parallelism=kind), device).total
            for kind in ("ep", "fssdp")
        )
        assert least <= plain / sharing <= most, load


def test_a_link_too_slow_for_any_copy_leaves_what_expert_parallelism_takes(make_job) -> None:
    device = hardware("h200", 8)
    slow = replace(device, fast_link=replace(device.fast_link, bytes_per_second=1e6))
    workload = routed(make_job)
    assert limits_of(workload, slow, 1e-3).movable == 0
    plain, sharing = (estimate_time(replace(workload, expert_parallelism=kind), slow) for kind in ("ep", "fssdp"))
    assert sharing.compute == pytest.approx(plain.compute)


def test_memory_has_room_for_copies(make_job) -> None:
    device, workload = hardware("h200", 8), routed(make_job)
    sharing, plain = (estimate_memory(replace(workload, expert_parallelism=kind), device) for kind in ("fssdp", "ep"))
    assert copies_bytes(workload, device) > 0
    assert sharing.workspace - plain.workspace == pytest.approx(copies_bytes(workload, device), abs=2)


def test_a_plan_decides_whether_experts_are_shared_and_says_what_the_other_would_be(make_job) -> None:
    job = make_job(
        "qwen3_30b_a3b", "h200_x8", {"expert_parallelism": None, "dp": 8, "ep": 8, "tp": 1, "pp": 1, "cp": 1}
    )
    best = plan_job(job).plans[0]
    assert best.options["expert_parallelism"] == "fssdp"
    assert "expert_parallelism fssdp" in best.label
    turned = [each for each in explain(job, best, device_of(job)).neighbours if "expert_parallelism" in each.label]
    assert turned
    assert turned[0].plan is not None
    assert turned[0].seconds_gained < 0
    assert plan_job(make_job("qwen3_30b_a3b", "h200_x8")).plans[0].options["expert_parallelism"] == "ep"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (
            "fast_link",
            [1e-5, 1e6],
            "an expert of 9.4 MB takes 9,437.19 ms over the link, and attention, ",
        ),
        ("memory_bytes", 4e8, "copies of an expert of 9.4 MB for two layers are more than 4% of a device's memory"),
    ],
)
def test_what_leaves_no_expert_to_be_copied_is_said(make_job, tmp_path, field: str, value: object, says: str) -> None:
    fixed = {"dp": 8, "ep": 8, "tp": 1, "pp": 1, "cp": 1, "vpp": 1, "etp": 1, "micro_batch": 1}
    shipped = make_job("qwen3_30b_a3b", "h200_x8", fixed | {"expert_parallelism": "fssdp"})
    assert unshared(shipped) is None
    profile = json.loads(shipped_text("h200"))
    profile[field]["value"] = value
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(profile))
    slow = shipped.model_copy(update={"cluster": shipped.cluster.model_copy(update={"hardware": str(path)})})
    assert says in unshared(slow)
    plain = slow.model_copy(update={"layout": slow.layout.model_copy(update={"expert_parallelism": "ep"})})
    assert unshared(plain) is None
