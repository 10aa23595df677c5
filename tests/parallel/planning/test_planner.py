"""Planning: what is found, what is refused and why, and that it is quick."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobs.errors import InputError
from jobs.spec import SIMPLEST, LayoutSpec
from parallel.capabilities import ATTENTION_RULES, EXPERT_RULES, batch_refusal, refusal
from parallel.estimates.costs import estimate_time
from parallel.estimates.hardware import Hardware, hardware
from parallel.estimates.memory import LIKELY_OUT, estimate_memory
from parallel.estimates.swapping import settled, share_of
from parallel.estimates.workload import Workload
from parallel.layout import Layout
from parallel.planning.options import variants
from parallel.planning.planner import device_of, plan_job, resolve
from parallel.planning.search import SMALLER_SHARES

ROOT = Path(__file__).parents[3]


def message(job: Any) -> str:
    with pytest.raises(InputError) as caught:
        plan_job(job)
    return str(caught.value)


def test_every_plan_runs_and_fits_and_is_ranked(make_job: Any) -> None:
    job = make_job("mixtral_8x7b", "h100_x8", nodes=4, global_batch=64)
    planning = plan_job(job)
    seconds = [plan.time.total for plan in planning.plans]
    assert seconds == sorted(seconds)
    assert len({plan.layout for plan in planning.plans}) == len(planning.plans)
    for plan in planning.plans:
        assert plan.layout.world == 32
        assert refusal(ATTENTION_RULES + EXPERT_RULES, plan.layout, job) is None
        assert plan.layout.dp * plan.micro_batch * plan.micro_batches == 64
        assert plan.memory.total <= hardware("h100", 8).memory_bytes
        assert plan.mfu is not None
        assert 0 < plan.mfu < 0.6  # no more than products reach alone
    assert planning.considered == len(planning.plans) + sum(one.count for one in planning.rejections)


def test_every_class_of_rejection_is_counted_with_an_example(make_job: Any) -> None:
    planning = plan_job(make_job("mixtral_8x7b", "h100_x8", {"cp": 1}, nodes=2))
    found = {one.key: (one.count, one.example) for one in planning.rejections}
    # tp=16: pp=dp=1. Experts: ep=16 at every plane of 16 ranks, tp 1 to 8.
    assert found["kv_heads"] == (1, "tp=16 exceeds kv_heads=8, which are not replicated")
    assert found["experts"] == (4, "ep=16 does not divide experts=8")
    assert set(found) == {"kv_heads", "experts", "memory"}


def test_memorys_example_is_the_nearest_miss(make_job: Any) -> None:
    shown = message(make_job("mixtral_8x7b", "h100_x8"))
    assert shown.startswith("cluster.nodes=1: tp8 etp8 with micro_batch=1, recompute full needs 1")
    assert "GiB a device, which has 79.1 GiB; " in shown
    assert shown.endswith("nearest valid: nodes=2")


def test_fixed_degrees_are_kept(make_job: Any) -> None:
    fixed = {"tp": 2, "ep": 2, "micro_batch": 4}
    for plan in plan_job(make_job(layout=fixed)).plans:
        assert (plan.layout.tp, plan.layout.ep, plan.micro_batch, plan.layout.world) == (2, 2, 4, 4)


def test_all_four_fixed_may_leave_devices_idle(make_job: Any) -> None:
    planning = plan_job(make_job(layout={"tp": 1, "cp": 1, "dp": 2, "pp": 1}))
    assert {plan.layout.world for plan in planning.plans} == {2}


def test_a_resolved_job_plans_to_itself(make_job: Any) -> None:
    for model, cluster in (("quickstart", "laptop"), ("moe_1b", "h200_x2"), ("llama3_8b", "h100_x8")):
        job = make_job(model, cluster, sequence_length=256)
        best = plan_job(job).plans[0]
        resolved = resolve(job, best)
        assert len(resolved.layout.degrees) == 7
        assert plan_job(resolved).plans == (best,)
        assert resolved.model_copy(update={"layout": LayoutSpec()}) == job


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_auto_becomes_the_share_of_swapped_tokens(make_job: Any, engine: str) -> None:
    shape = {"sequence_length": 65536, "global_batch": 8, "engine": engine}
    job = make_job("llama3_8b", "h200_x8", {"offload_activations": "auto"}, **shape)
    for plan in plan_job(job).plans[:8]:
        resolved = resolve(job, plan)
        share = resolved.layout.offload_activations
        assert isinstance(share, float)
        assert plan.options["offload_activations"] == share
        assert plan.label.endswith(f"offload_activations {share:g}")
        (again,) = plan_job(resolved).plans
        assert again == plan
    # What all activations leave no room for fits.
    alone = {"offload_activations": None, "tp": 1, "cp": 1, "pp": 1, "recompute": "none"}
    with pytest.raises(InputError, match="GiB a device"):
        plan_job(make_job("llama3_8b", "h200_x8", alone, **shape))
    assert plan_job(make_job("llama3_8b", "h200_x8", alone | {"offload_activations": "auto"}, **shape)).plans


@pytest.mark.parametrize("share", ["auto", 0.5])
def test_auto_is_refused_where_a_share_is(make_job: Any, share: Any) -> None:
    dropping = {"capacity_factor": 1.0}
    with pytest.raises(InputError, match=f"^layout.offload_activations={share}: tokens come to experts in two parts"):
        plan_job(make_job("mixtral_8x7b", "h200_x8", {"offload_activations": share}, model_changes=dropping))


def test_where_host_memory_holds_too_little_auto_becomes_null(make_job: Any) -> None:
    job = make_job("llama3_8b", "h200_x8", {"offload_activations": "auto", "tp": 8})
    device = replace(device_of(job), host_memory_bytes=10**6)
    (plan,) = plan_job(job, device).plans
    assert plan.options["offload_activations"] is None
    assert resolve(job, plan).layout.offload_activations is None
    (without,) = plan_job(make_job("llama3_8b", "h200_x8", {"tp": 8, "recompute": "none"}), device).plans
    assert plan.time == without.time


def test_auto_swaps_fewer_tokens_where_as_many_as_the_link_carries_do_not_fit(make_job: Any) -> None:
    fixed = {"tp": 1, "cp": 4, "dp": 2, "micro_batch": 1, "recompute": "none"}
    long = {"sequence_length": 131_072, "global_batch": 8}
    job = make_job("llama3_8b", "h200_x8", {**fixed, "offload_activations": "auto"}, **long)

    def at(memory: float) -> tuple[float, int]:
        (plan,) = plan_job(job, replace(device_of(job), memory_bytes=int(memory))).plans
        return plan.options["offload_activations"], plan.memory.total

    share, needed = at(140e9)
    smaller, less = at(needed - 1e9)
    assert smaller < share
    assert less < needed


def test_a_dense_model_has_no_expert_mesh(make_job: Any) -> None:
    plans = plan_job(make_job("llama3_8b", "h100_x8")).plans
    assert {(plan.layout.ep, plan.layout.etp) for plan in plans} == {(1, 1)}
    shown = message(make_job("llama3_8b", "h100_x8", {"ep": 2}))
    assert shown.startswith("layout.ep=2: no layout on 8 devices runs: ep=2, but llama3_8b has no experts")
    assert shown.endswith("nearest valid: ep=1")


def test_no_mfu_without_a_known_peak(make_job: Any) -> None:
    assert all(plan.mfu is None for plan in plan_job(make_job(precision="fp32")).plans)


@pytest.mark.parametrize(
    ("layout", "shown"),
    [
        ({"tp": 3}, "layout.tp=3: tp=3 does not divide the cluster's 4 devices; nearest valid: tp=2 or tp=1"),
        ({"tp": 4}, "layout.tp=4: tp=4 exceeds kv_heads=2, which are not replicated; nearest valid: tp=2 or tp=1"),
        ({"pp": 2, "vpp": 4}, "layout.vpp=4: pp*vpp=2*4=8 does not divide layers=4; nearest valid: vpp=2 or vpp=1"),
        ({"pp": 8}, "layout.pp=8: pp=8 exceeds the cluster's 4 devices; nearest valid: pp=4 or pp=2 or pp=1"),
        (
            {"tp": 2, "cp": 1, "dp": 4, "pp": 2},
            "layout.dp=4: tp*cp*dp*pp=2*1*4*2=16 exceeds the cluster's 4 devices; nearest valid: dp=1",
        ),
        (
            {"tp": 2, "dp": 4},
            "layout.dp=4: tp*dp=2*4=8 exceeds the cluster's 4 devices; nearest valid: dp=2 or tp=1 or dp=1",
        ),
        (
            {"cp": 1, "dp": 4, "ep": 8},
            "layout.ep=8: etp*ep=1*8=8 does not divide tp*cp*dp=1*1*4=4; nearest valid: ep=4 or ep=2 or ep=1",
        ),
    ],
)  # fmt: skip
def test_a_fixed_degree_that_cannot_be(make_job: Any, layout: dict[str, int], shown: str) -> None:
    assert message(make_job(layout=layout)) == shown


def test_what_blames_the_changed_degree_is_said_first_and_all_is_counted(make_job: Any) -> None:
    shown = message(make_job("mixtral_8x7b", "h100_x8", {"tp": 2, "cp": 1, "ep": 16}, nodes=8, global_batch=256))
    assert shown == (
        "layout.ep=16: no layout on 64 devices runs: ep=16 does not divide experts=8 (experts: 6); "
        "etp*ep=1*16=16 does not divide tp*cp*dp=2*1*4=8 (expert mesh: 3); "
        "nearest valid: ep=8 or ep=4 or ep=2"
    )


def test_two_degrees_are_changed_only_where_one_does_not_do(make_job: Any) -> None:
    assert message(make_job(layout={"tp": 3, "pp": 3})).endswith("nearest valid: tp=2 pp=2 or tp=1 pp=4 or tp=1 pp=2")


def test_a_micro_batch_that_does_not_divide(make_job: Any) -> None:
    shown = message(make_job(layout={"micro_batch": 3}))
    assert "micro_batch=3 does not divide global_batch/dp=32/4=8" in shown
    assert shown.startswith("layout.micro_batch=3: ")
    assert shown.endswith("nearest valid: micro_batch=4 or micro_batch=2 or micro_batch=8")


def test_a_cluster_that_nothing_fits_gets_a_smaller_one(make_job: Any) -> None:
    shown = message(make_job(devices_per_node=3))
    assert shown.startswith(
        "cluster.devices_per_node=3: no layout on 3 devices runs: dp=3 does not divide global_batch=32"
    )
    assert shown.endswith("nearest valid: devices_per_node=2")


def test_a_model_that_no_number_of_nodes_holds(make_job: Any) -> None:
    job = make_job("deepseek_v3", "laptop", model_changes={"kv_lora_rank": 0, "router_bias": False, "layers": 997,
                                                           "router_score": "softmax"})  # fmt: skip
    assert message(job).startswith("cluster=laptop: no layout on 4 devices runs: ")


@settings(deadline=None, max_examples=60)
@given(
    st.fixed_dictionaries(
        {
            axis: st.sampled_from([None, None, 1, 2, 3, 4])
            for axis in ("tp", "cp", "pp", "vpp", "dp", "ep", "etp", "micro_batch")
        }
    )
)
def test_the_nearest_layout_named_does_run(make_job: Any, degrees: dict[str, int | None]) -> None:
    fixed = {axis: degree for axis, degree in degrees.items() if degree}
    try:
        assert plan_job(make_job(layout=fixed, precision="fp32", sequence_length=64)).plans
        return
    except InputError as error:
        refused = error
    axis = refused.path.removeprefix("layout.")
    assert refused.value == fixed[axis]
    for number, choice in enumerate(str(refused.nearest).split(" or ")):
        mended = {name: int(degree) for name, _, degree in (part.partition("=") for part in choice.split())}
        assert number or axis in mended
        assert plan_job(make_job(layout=fixed | mended, precision="fp32", sequence_length=64)).plans


def test_a_plan_is_plain_json(make_job: Any) -> None:
    shown = json.loads(json.dumps(plan_job(make_job("moe_1b", "h200_x2", global_batch=8)).plans[0].as_dict()))
    assert shown["layout"]["dp"] * shown["layout"]["tp"] * shown["layout"]["pp"] == 2
    parts = {name: value for name, value in shown["memory_bytes"].items() if name != "total"}
    assert sum(parts.values()) == shown["memory_bytes"]["total"]
    assert shown["step_seconds"] == shown["time_seconds"]["total"]
    assert shown["tokens_per_second"] == pytest.approx(8 * 4096 / shown["step_seconds"])


def test_a_large_cluster_of_an_odd_size_is_planned(make_job: Any) -> None:
    job = make_job("mixtral_8x7b", "h100_x8", {"cp": 1, "etp": 1}, nodes=126, global_batch=1008)
    assert {plan.layout.world for plan in plan_job(job).plans} == {1008}


def test_options_that_are_left_open_are_chosen_and_those_that_are_given_are_kept(make_job: Any) -> None:
    tight = make_job("llama3_8b", "a100_x8", sequence_length=8192)
    assert any(plan.options["recompute"] != "none" for plan in plan_job(tight).plans)
    assert any(plan.layout.vpp > 1 for plan in plan_job(tight).plans)
    given = {"recompute": "selective", "recompute_modules": ("mlp",), "vpp": 1}
    for plan in plan_job(make_job("llama3_8b", "a100_x8", given, sequence_length=8192)).plans:
        assert plan.options | given == plan.options | {"vpp": 1}
        assert plan.layout.vpp == 1


def test_a_deepspeed_job_is_sharded_and_offloaded_as_far_as_it_must(make_job: Any) -> None:
    job = make_job("llama3_70b", "a100_x8", engine="deepspeed", nodes=1)
    plans = plan_job(job).plans
    assert {plan.options["offload_optimizer"] for plan in plans} == {"cpu"}
    assert plan_job(make_job("llama3_8b", "a100_x8", engine="deepspeed", nodes=4)).plans[0].options == SIMPLEST | {
        "recompute_modules": ()
    }


@settings(deadline=None, max_examples=12)
@given(
    model=st.sampled_from(["quickstart", "moe_1b", "llama3_8b"]),
    engine=st.sampled_from(["megatron", "deepspeed"]),
    devices=st.sampled_from([2, 4, 8]),
    global_batch=st.sampled_from([4, 12, 16]),
    gigabytes=st.sampled_from([6, 12, 40, 80]),
    fixed=st.sampled_from(
        [
            *({}, {"tp": 2}, {"recompute": "full"}, {"micro_batch": 2}, {"vpp": 1, "zero_stage": 1}),
            *({"offload_activations": "auto"}, {"offload_activations": 0.25}),
        ]
    ),
)
@example(
    model="moe_1b", engine="megatron", devices=2, global_batch=12, gigabytes=6, fixed={"offload_activations": "auto"}
)
def test_the_search_finds_what_trying_everything_does(
    make_job: Any, model: str, engine: str, devices: int, global_batch: int, gigabytes: int, fixed: dict[str, Any]
) -> None:
    changes = {"layers": 4} | ({"heads": 8, "kv_heads": 4} if model == "llama3_8b" else {})
    job = make_job(
        model, "h100_x8", fixed, engine=engine, global_batch=global_batch, devices_per_node=devices,
        model_changes=changes,
    )  # fmt: skip
    device = replace(device_of(job), memory_bytes=gigabytes * 10**9)
    runnable: dict[Layout, float] = {}
    for layout, micro_batch in everything(job):
        share = job.train.global_batch // layout.dp
        for variant in variants(job):
            if share % micro_batch or refusal(ATTENTION_RULES + EXPERT_RULES, layout, variant):
                continue
            if batch_refusal(layout, variant, share // micro_batch):
                continue
            for step in by_share(Workload.of(variant, layout, micro_batch), device):
                if estimate_memory(step, device).p_out_of_memory(device.memory_bytes) <= LIKELY_OUT:
                    seconds = estimate_time(step, device).total
                    runnable[layout] = min(seconds, runnable.get(layout, seconds))
                    break
    try:
        plans = plan_job(job, device).plans
    except InputError:
        plans = ()
    assert {plan.layout: plan.time.total for plan in plans} == runnable


def by_share(step: Workload, device: Hardware) -> Iterator[Workload]:
    """As many swapped tokens as the link carries, where that is open, then fewer."""
    yield step
    best = settled(step, device)
    if best is not step and best.swapping is not None:
        for share in SMALLER_SHARES:
            if share < share_of(best):
                yield replace(best, swapping=replace(best.swapping, share=share))


def everything(job: Any) -> Iterator[tuple[Layout, int]]:
    """Every layout of a job's devices with every micro-batch, fixed ones as they are fixed."""
    fixed, devices = job.layout, job.cluster.devices
    degrees = [d for d in range(1, devices + 1) if devices % d == 0]

    def choices(name: str, every: list[int]) -> list[int]:
        return every if getattr(fixed, name) is None else [getattr(fixed, name)]

    for tp, cp, pp in itertools.product(*(choices(axis, degrees) for axis in ("tp", "cp", "pp"))):
        if devices % (tp * cp * pp):
            continue
        plane = devices // pp
        for ep, etp in itertools.product(degrees, degrees) if job.model.is_moe else [(1, 1)]:
            for vpp in choices("vpp", list(range(1, job.model.layers + 1))):
                if plane % (ep * etp) == 0 and (vpp == 1 or pp > 1):
                    layout = Layout(tp=tp, cp=cp, dp=plane // (tp * cp), pp=pp, vpp=vpp, ep=ep, etp=etp)
                    for micro_batch in choices("micro_batch", list(range(1, job.train.global_batch + 1))):
                        yield layout, micro_batch


def test_what_fits_as_it_is_recomputes_nothing(make_job: Any) -> None:
    best = plan_job(make_job()).plans[0]
    assert best.options == SIMPLEST | {"recompute_modules": ()}


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys, parallel.planning.planner; print(sorted({'torch', 'numpy', 'ray', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
