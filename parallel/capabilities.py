"""What an engine can run, as data: one table of small rules, each of which refuses with its reason or says nothing.

A reason is the whole sentence with its numbers ("ep=16 does not divide experts=8"). A rule names the engines it binds
and looks at one of four things, in four parts of the table, so that the planner can refuse early: the job itself, the
attention mesh (tp, cp, dp, pp, vpp), the expert mesh (etp, ep), the batch. What no rule refuses, the engine trains
exactly: tests/exactness holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Literal

from jobs.errors import CombinedInputError, InputError
from jobs.spec import JobSpec
from parallel.layout import Layout

Reason = Callable[[Layout, JobSpec], str | None]
Engines = tuple[Literal["megatron", "deepspeed"], ...]

BOTH: Engines = ("megatron", "deepspeed")
MEGATRON: Engines = ("megatron",)
DEEPSPEED: Engines = ("deepspeed",)


@dataclass(frozen=True)
class JobRule:
    """Refuses a job whatever its layout. `path` is the value to blame, `nearest` one that would do."""

    path: str
    engines: Engines
    reason: Callable[[JobSpec], str | None]
    nearest: object = None


@dataclass(frozen=True)
class Rule:
    """Refuses a layout. `key` names the class of refusals in a plan's account; `axis` is the degree that it blames."""

    key: str
    axis: str
    engines: Engines
    reason: Reason


@dataclass(frozen=True)
class BatchRule:
    """Refuses a micro-batch at a layout, given how many of them a rank computes in a step."""

    key: str
    axis: str
    engines: Engines
    reason: Callable[[Layout, JobSpec, int], str | None]


def check_job(job: JobSpec) -> None:
    """InputError where the engine cannot train this job at any layout; of several reasons, all."""
    errors = []
    for rule in JOB_RULES:
        reason = rule.reason(job) if job.engine in rule.engines else None
        if reason is not None:
            value = reduce(getattr, rule.path.split("."), job)
            errors.append(InputError(rule.path, value, reason, rule.nearest))
    if errors:
        raise errors[0] if len(errors) == 1 else CombinedInputError(errors)


def refusal(rules: tuple[Rule, ...], layout: Layout, job: JobSpec) -> tuple[Rule, str] | None:
    """The first rule that the layout breaks, and how; None where it breaks none."""
    for rule in rules:
        reason = rule.reason(layout, job) if job.engine in rule.engines else None
        if reason is not None:
            return rule, reason
    return None


def batch_refusal(layout: Layout, job: JobSpec, micro_batches: int) -> tuple[BatchRule, str] | None:
    """The first rule that `micro_batches` a step break, and how; None where they break none."""
    for rule in BATCH_RULES:
        reason = rule.reason(layout, job, micro_batches) if job.engine in rule.engines else None
        if reason is not None:
            return rule, reason
    return None


# Jobs.


def _when(refused: Callable[[JobSpec], object], reason: str) -> Callable[[JobSpec], str | None]:
    return lambda job: reason if refused(job) else None


def _moe(job: JobSpec) -> bool:
    return job.model.is_moe


def _no_room_for_optimizer(job: JobSpec) -> str | None:
    stage, place = job.layout.zero_stage, job.layout.offload_optimizer
    least = {"none": 0, "cpu": 1, "nvme": 3}[place]
    return None if stage >= least else f"wants zero_stage of at least {least}, zero_stage={stage}"


def _no_room_for_parameters(job: JobSpec) -> str | None:
    stage, place = job.layout.zero_stage, job.layout.offload_parameters
    return None if stage == 3 or place == "none" else f"wants zero_stage=3, zero_stage={stage}"


def _no_nvme_folder(job: JobSpec) -> str | None:
    layout = job.layout
    wanted = "nvme" in (layout.offload_optimizer, layout.offload_parameters) and layout.nvme_folder is None
    return "offload to nvme needs a folder for its files, the same on every node" if wanted else None


JOB_RULES = (
    JobRule(
        "model.kv_lora_rank",
        BOTH,
        _when(lambda job: job.model.is_multi_latent, "no engine runs multi-latent attention yet"),
        nearest=0,
    ),
    JobRule(
        "model.router_normalize_top_k",
        BOTH,
        _when(
            lambda job: _moe(job) and job.model.router_normalize_top_k and job.model.top_k == 1,
            "the one chosen expert of top_k=1 would always weigh 1, and the router never learn",
        ),
        nearest=False,
    ),
    JobRule(
        "model.router_bias",
        MEGATRON,
        _when(
            lambda job: _moe(job) and job.model.router_bias,
            "the megatron engine does not balance experts by a router bias yet; use model.aux_loss",
        ),
        nearest=False,
    ),
    JobRule(
        "model.router_score",
        MEGATRON,
        _when(
            lambda job: _moe(job) and job.model.router_score != "softmax",
            "the megatron engine does not score experts by sigmoid yet",
        ),
        nearest="softmax",
    ),
    JobRule(
        "layout.dispatcher",
        DEEPSPEED,
        _when(
            lambda job: _moe(job) and job.layout.dispatcher != "alltoall",
            "the deepspeed engine sends tokens to experts by an all-to-all of their number",
        ),
        nearest="alltoall",
    ),
    JobRule(
        "layout.recompute",
        DEEPSPEED,
        _when(lambda job: job.layout.recompute == "selective", "the deepspeed engine recomputes whole layers, or none"),
        nearest="full",
    ),
    JobRule(
        "layout.optimizer_replicas",
        DEEPSPEED,
        _when(lambda job: job.layout.optimizer_replicas > 1, "ZeRO shards over all data parallel ranks"),
        nearest=1,
    ),
    JobRule(
        "layout.zero_stage",
        DEEPSPEED,
        _when(
            lambda job: job.layout.zero_stage == 0 and job.train.precision == "bf16",
            "without ZeRO, DeepSpeed adds micro-batches' gradients up in bf16",
        ),
        nearest=1,
    ),
    JobRule("layout.offload_optimizer", DEEPSPEED, _no_room_for_optimizer, nearest="none"),
    JobRule("layout.offload_parameters", DEEPSPEED, _no_room_for_parameters, nearest="none"),
    JobRule("layout.nvme_folder", DEEPSPEED, _no_nvme_folder),
)


# Layouts.


def _divides(axis: str, name: str, size: Callable[[JobSpec], int]) -> Reason:
    def reason(layout: Layout, job: JobSpec) -> str | None:
        degree, whole = layout.degree(axis), size(job)
        return None if whole % degree == 0 else f"{axis}={degree} does not divide {name}={whole}"

    return reason


def _kv_heads(layout: Layout, job: JobSpec) -> str | None:
    heads = job.model.kv_heads
    if layout.tp > heads:
        return f"tp={layout.tp} exceeds kv_heads={heads}, which are not replicated"
    return None if heads % layout.tp == 0 else f"tp={layout.tp} does not divide kv_heads={heads}"


def _no_context_parallelism(layout: Layout, job: JobSpec) -> str | None:
    degree = layout.cp
    return None if degree == 1 else f"cp={degree}: context parallelism is not available in the {job.engine} engine yet"


def _no_experts(axis: str) -> Reason:
    def reason(layout: Layout, job: JobSpec) -> str | None:
        degree = layout.degree(axis)
        return None if _moe(job) or degree == 1 else f"{axis}={degree}, but {job.model.name} has no experts"

    return reason


def _no_virtual_stages(layout: Layout, job: JobSpec) -> str | None:
    if layout.vpp == 1:
        return None
    return f"vpp={layout.vpp}: the interleaved schedule is not available in the {job.engine} engine yet"


def _above_one(axis: str, why: str) -> Reason:
    def reason(layout: Layout, job: JobSpec) -> str | None:
        degree = layout.degree(axis)
        return None if degree == 1 else f"{axis}={degree}: {why}"

    return reason


def _experts_under_zero_3(layout: Layout, job: JobSpec) -> str | None:
    if layout.ep == 1 or job.layout.zero_stage < 3:
        return None
    return f"ep={layout.ep}: DeepSpeed keeps experts whole below ZeRO-3 only, zero_stage={job.layout.zero_stage}"


ATTENTION_RULES = (
    Rule(
        "tensor parallelism",
        "tp",
        DEEPSPEED,
        _above_one("tp", "tensor parallelism is not available in the deepspeed engine yet"),
    ),
    Rule("pipeline", "pp", DEEPSPEED, _above_one("pp", "the pipeline is not available in the deepspeed engine yet")),
    Rule("context parallelism", "cp", BOTH, _no_context_parallelism),
    Rule("virtual stages", "vpp", BOTH, _no_virtual_stages),
    Rule("layers", "pp", BOTH, _divides("pp", "layers", lambda job: job.model.layers)),
    Rule("heads", "tp", BOTH, _divides("tp", "heads", lambda job: job.model.heads)),
    Rule("kv_heads", "tp", BOTH, _kv_heads),
    Rule("vocab", "tp", BOTH, _divides("tp", "vocab", lambda job: job.model.vocab)),
    Rule("ffn", "tp", BOTH, _divides("tp", "ffn", lambda job: job.model.ffn if job.model.dense_layers else 0)),
    Rule(
        "shared_expert_ffn",
        "tp",
        BOTH,
        _divides("tp", "shared_expert_ffn", lambda job: job.model.shared_expert_ffn if _moe(job) else 0),
    ),
    # Sequence parallelism, which goes with tp, splits the sequence too.
    Rule("sequence_length", "tp", MEGATRON, _divides("tp", "sequence_length", lambda job: job.train.sequence_length)),
    Rule("global_batch", "dp", BOTH, _divides("dp", "global_batch", lambda job: job.train.global_batch)),
)

EXPERT_RULES = (
    Rule("dense model", "ep", BOTH, _no_experts("ep")),
    Rule("dense model", "etp", BOTH, _no_experts("etp")),
    Rule("experts", "ep", BOTH, _divides("ep", "experts", lambda job: job.model.experts)),
    Rule("expert_ffn", "etp", BOTH, _divides("etp", "expert_ffn", lambda job: job.model.expert_ffn)),
    Rule(
        "expert tensor parallelism",
        "etp",
        DEEPSPEED,
        _above_one("etp", "the deepspeed engine shards experts over ep, never within one"),
    ),
    Rule("experts under ZeRO-3", "ep", DEEPSPEED, _experts_under_zero_3),
)

BATCH_RULES: tuple[BatchRule, ...] = ()
