"""What an engine can run, as data: a table of small named rules, each `(layout, job) -> reason or None`.

A reason is the whole sentence with its numbers ("ep=16 does not divide experts=8"). A rule looks at one of four
things, and the tables are kept apart so that the planner can refuse early: the job itself, the attention mesh
(tp, cp, dp, pp), the expert mesh (etp, ep), the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jobs.errors import InputError
from jobs.spec import JobSpec
from parallel.layout import Layout

Reason = Callable[[Layout, JobSpec], str | None]


@dataclass(frozen=True)
class Rule:
    """`key` names the class of refusals in a plan's account; `axis` is the degree that it blames."""

    key: str
    axis: str
    reason: Reason


def check_job(job: JobSpec) -> None:
    """InputError where the engine cannot train this job at any layout."""
    if job.engine != "megatron":
        raise InputError("engine", job.engine, f"the {job.engine} engine is not available yet", "megatron")
    if (job.layout.vpp or 1) > 1:
        rule = "the interleaved schedule is not available in the megatron engine yet"
        raise InputError("layout.vpp", job.layout.vpp, rule, 1)
    model = job.model
    if model.is_multi_latent:
        rule = "the megatron engine does not run multi-latent attention yet"
        raise InputError("model.kv_lora_rank", model.kv_lora_rank, rule, 0)
    if model.is_moe and model.router_bias:
        rule = "the megatron engine does not balance experts by a router bias yet; use model.aux_loss"
        raise InputError("model.router_bias", True, rule, False)
    if model.is_moe and model.router_score != "softmax":
        rule = "the megatron engine does not score experts by sigmoid yet"
        raise InputError("model.router_score", model.router_score, rule, "softmax")
    if model.is_moe and model.router_normalize_top_k and model.top_k == 1:
        rule = "the one chosen expert of top_k=1 would always weigh 1, and the router never learn"
        raise InputError("model.router_normalize_top_k", True, rule, False)


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
        return None if job.model.is_moe or degree == 1 else f"{axis}={degree}, but {job.model.name} has no experts"

    return reason


ATTENTION_RULES = (
    Rule("context parallelism", "cp", _no_context_parallelism),
    Rule("layers", "pp", _divides("pp", "layers", lambda job: job.model.layers)),
    Rule("heads", "tp", _divides("tp", "heads", lambda job: job.model.heads)),
    Rule("kv_heads", "tp", _kv_heads),
    Rule("vocab", "tp", _divides("tp", "vocab", lambda job: job.model.vocab)),
    Rule("ffn", "tp", _divides("tp", "ffn", lambda job: job.model.ffn if job.model.dense_layers else 0)),
    Rule(
        "shared_expert_ffn",
        "tp",
        _divides("tp", "shared_expert_ffn", lambda job: job.model.shared_expert_ffn if job.model.is_moe else 0),
    ),
    # Sequence parallelism, which goes with tp, splits the sequence too.
    Rule("sequence_length", "tp", _divides("tp", "sequence_length", lambda job: job.train.sequence_length)),
    Rule("global_batch", "dp", _divides("dp", "global_batch", lambda job: job.train.global_batch)),
)

EXPERT_RULES = (
    Rule("dense model", "ep", _no_experts("ep")),
    Rule("dense model", "etp", _no_experts("etp")),
    Rule("experts", "ep", _divides("ep", "experts", lambda job: job.model.experts)),
    Rule("expert_ffn", "etp", _divides("etp", "expert_ffn", lambda job: job.model.expert_ffn)),
)


def refusal(rules: tuple[Rule, ...], layout: Layout, job: JobSpec) -> tuple[Rule, str] | None:
    """The first rule that the layout breaks, and how; None where it breaks none."""
    for rule in rules:
        reason = rule.reason(layout, job)
        if reason is not None:
            return rule, reason
    return None
