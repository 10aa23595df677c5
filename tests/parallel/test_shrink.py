"""Jobs made small: they run, and what divided still divides."""

from __future__ import annotations

from typing import Any

import pytest

from jobs import compose
from jobs.errors import InputError
from jobs.spec import DEGREES, JobSpec
from parallel.capabilities import why_refused
from parallel.layout import Layout
from parallel.planning.planner import plan_job, resolve
from parallel.shrink import RANKS, RANKS_OF_FOUR_AXES, STEPS, shrink

JOBS = [name for name in compose.job_names() if name != "deepseek_v3"]
CLUSTERS = (
    ("laptop", ()),
    ("h200_x2", ()),
    ("h100_x8", ("cluster.nodes=4", "layout.etp=1")),
    ("h100_x8", ("cluster.nodes=16", "layout.cp=1", "layout.vpp=1")),
    ("a100_x8", ("cluster.nodes=16", "layout.pp=4", "layout.vpp=2")),
    ("h200_x8", ("cluster.nodes=4", "layout.tp=2", "layout.cp=2", "layout.pp=2")),
)
PLANS = 6
"""Of each planning: its first, its last and those between at equal distances."""


def planned(name: str, cluster: str, overrides: tuple[str, ...]) -> list[JobSpec]:
    """Resolved jobs at layouts of every kind that planning finds; none where nothing fits."""
    job = compose.compose(name, (f"cluster={cluster}", *overrides))
    try:
        plans = plan_job(job).plans
    except InputError:
        return []
    every = max(1, (len(plans) - 1) // (PLANS - 1))
    return [resolve(job, plan) for plan in plans[::every]]


@pytest.mark.parametrize("name", JOBS)
def test_every_shipped_job_is_small_and_runs_at_every_layout(name: str) -> None:
    jobs = [job for cluster, overrides in CLUSTERS for job in planned(name, cluster, overrides)]
    assert jobs
    for job in jobs:
        small, before, after = shrink(job).job, Layout.of(job.layout), Layout.of(shrink(job).job.layout)
        assert why_refused(small) is None
        assert after.world <= (RANKS_OF_FOUR_AXES if min(after.tp, after.cp, after.dp, after.pp) > 1 else RANKS)
        assert all(before.degree(axis) % after.degree(axis) == 0 for axis in DEGREES)
        assert after == before or before.world > RANKS
        assert small.model.parameters < 200_000 * after.pp * after.vpp
        assert small.train.global_batch * small.train.sequence_length * STEPS < 100_000
        assert small.model.is_moe == job.model.is_moe
        assert small.model.heads // small.model.kv_heads == job.model.heads // job.model.kv_heads


def moe(make_job: Any, layout: dict[str, Any], **options: Any) -> JobSpec:
    model = {"first_dense_layers": 1, "ffn": 4096} | options.pop("model_changes", {})
    layout = {"vpp": 1, "etp": 1, "micro_batch": 1} | layout
    job: JobSpec = make_job(
        "qwen2_57b_a14b", "h100_x8", layout, global_batch=256, nodes=64, model_changes=model, **options
    )
    return job


def test_axes_stay_above_one_before_degrees_stay_what_they_were(make_job: Any) -> None:
    cases = {
        (4, 1, 8, 2, 8): "tp2 dp2 pp2 ep2",  # replicas of experts are an axis too: ep4 would leave none
        (4, 1, 8, 2, 32): "tp2 dp2 pp2 ep4",
        (2, 2, 16, 2, 8): "tp2 cp2 dp2 pp2 ep4",  # of four axes, twice the ranks
        (1, 1, 64, 1, 64): "dp8 ep8",
        (1, 1, 64, 2, 8): "dp4 pp2 ep2",
        (4, 1, 2, 1, 2): "tp4 dp2 ep2",  # as it was
    }
    for (tp, cp, dp, pp, ep), label in cases.items():
        layout = {"tp": tp, "cp": cp, "dp": dp, "pp": pp, "ep": ep}
        assert Layout.of(shrink(moe(make_job, layout)).job.layout).label == label


def test_sizes_are_the_smallest_that_the_layout_divides(make_job: Any) -> None:
    layout = {"tp": 4, "cp": 1, "dp": 2, "pp": 1, "ep": 2}
    small = shrink(moe(make_job, layout)).job
    model = small.model
    assert (model.layers, model.dense_layers, model.moe_layers) == (4, 1, 3)
    assert (model.heads, model.kv_heads) == (28, 4)  # seven to one, as 28 to 4
    assert (model.experts, model.top_k) == (4, 2)
    assert (model.expert_ffn, model.shared_expert_ffn, model.ffn) == (16, 16, 32)
    assert (small.train.sequence_length, small.train.global_batch) == (16, 4)
    assert (small.train.precision, small.train.steps, small.cluster.device) == ("fp32", STEPS, "cpu")


def test_virtual_stages_keep_their_rounds(make_job: Any) -> None:
    layout = {"tp": 1, "cp": 1, "dp": 2, "pp": 4, "vpp": 7, "ep": 2}
    small = shrink(moe(make_job, layout)).job
    assert Layout.of(small.layout).label == "dp2 pp4 vpp7 ep2"
    assert small.model.layers == 28
    assert small.train.global_batch // small.layout.dp % 4 == 0


def test_options_stay_and_those_that_no_cpu_runs_are_told(make_job: Any) -> None:
    layout = {"tp": 2, "cp": 1, "dp": 2, "pp": 1, "ep": 2, "recompute": "full", "optimizer_replicas": 2}
    small = shrink(moe(make_job, layout)).job
    assert (small.layout.recompute, small.layout.optimizer_replicas) == ("full", 2)
    shrunk = shrink(moe(make_job, layout | {"dispatcher": "flex"}))
    assert shrunk.job.layout.dispatcher == "alltoall"
    assert ("layout.dispatcher", "flex", "alltoall") in [
        (change.path, change.before, change.after) for change in shrunk.changes
    ]


def test_changes_are_all_that_differ_of_what_a_layout_divides(make_job: Any) -> None:
    job = moe(make_job, {"tp": 4, "cp": 1, "dp": 2, "pp": 1, "ep": 2})
    shrunk = shrink(job)
    before, after = job.model_dump(), shrunk.job.model_dump()
    told = {change.path for change in shrunk.changes}
    for part in ("model", "layout"):
        differ = {f"{part}.{name}" for name in before[part] if before[part][name] != after[part][name]}
        assert differ - {"model.init_std"} == {path for path in told if path.startswith(part)}
    assert told >= {"train.sequence_length", "train.global_batch"}


def test_a_layout_that_no_small_model_has_is_refused(make_job: Any) -> None:
    job = moe(make_job, {"tp": 4, "cp": 1, "dp": 1, "pp": 1, "ep": 1})
    latent = {"kv_lora_rank": 8, "rope_head_dim": 4, "value_head_dim": 4}
    with pytest.raises(InputError, match="no small layout of this kind runs on CPUs: no engine runs multi-latent"):
        shrink(job.model_copy(update={"model": job.model.model_copy(update=latent)}))
