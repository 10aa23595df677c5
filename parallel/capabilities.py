"""What an engine can run, as data: one table of small rules, each of which refuses with its reason or says nothing.

A reason is the whole sentence with its numbers ("ep=16 does not divide experts=8"). A rule names the engines it binds
and looks at one of four things, in four parts of the table, so that the planner can refuse early: the job itself, the
attention mesh (tp, cp, dp, pp, vpp), the expert mesh (etp, ep), the batch. What no rule refuses, the engine trains
exactly: tests/exactness holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from jobs.errors import CombinedInputError, InputError
from jobs.spec import JobSpec
from parallel import deepspeed_rules
from parallel.layout import Layout
from parallel.rules import BOTH, MEGATRON, BatchRule, JobRule, Reason, Rule, when


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


def why_refused(job: JobSpec) -> str | None:
    """The first reason why a job with every degree and the micro-batch given cannot run as it is; None: it can."""
    try:
        check_job(job)
        layout = Layout.of(job.layout)
    except InputError as error:
        return error.rule
    share, micro_batch = job.train.global_batch // layout.dp, job.layout.micro_batch or 1
    if share % micro_batch:
        return f"micro_batch={micro_batch} does not divide global_batch/dp={job.train.global_batch}/{layout.dp}={share}"
    broken = refusal(ATTENTION_RULES + EXPERT_RULES, layout, job) or batch_refusal(layout, job, share // micro_batch)
    return broken[1] if broken else None


# Jobs.


def _moe(job: JobSpec) -> bool:
    return job.model.is_moe


def _flex(job: JobSpec) -> bool:
    return _moe(job) and job.layout.dispatcher == "flex"


def _shared(job: JobSpec) -> bool:
    return _moe(job) and job.layout.expert_parallelism == "fssdp"


def _nothing_to_recompute(job: JobSpec) -> str | None:
    model, layout = job.model, job.layout
    layers = {
        "mlp": ("dense feed-forward layers", model.dense_layers),
        "moe": ("experts", model.moe_layers),
        "shared_experts": ("shared experts", _moe(job) and model.shared_expert_ffn),
    }
    if layout.recompute == "selective":
        for module in layout.recompute_modules or ():
            what, present = layers.get(module, ("", True))
            if not present:
                return f"{module} is of {what}, and {model.name} has none"
    return None


def _swaps(job: JobSpec) -> bool:
    return job.layout.offload_activations is not None


def _no_offload(field: str, what: str) -> Callable[[JobSpec], str | None]:
    return when(
        lambda job: getattr(job.layout, field) not in (None, "none"), f"the megatron engine keeps {what} on the device"
    )


JOB_RULES = (
    JobRule(
        "model.kv_lora_rank",
        BOTH,
        when(lambda job: job.model.is_multi_latent, "no engine runs multi-latent attention yet"),
        nearest=0,
    ),
    JobRule(
        "model.gated",
        BOTH,
        when(lambda job: not job.model.gated, "no engine runs a feed-forward block of two matrices and a GELU yet"),
        nearest=True,
    ),
    JobRule(
        "layout.context_attention",
        MEGATRON,
        when(
            lambda job: job.layout.context_attention == "ulysses",
            "the megatron engine exchanges keys and values over cp, at once (gather) or in turn (ring), not heads",
        ),
        nearest="gather",
    ),
    JobRule(
        "model.router_normalize_top_k",
        BOTH,
        when(
            lambda job: _moe(job) and job.model.router_normalize_top_k and job.model.top_k == 1,
            "the one chosen expert of top_k=1 would always weigh 1, and the router never learn",
        ),
        nearest=False,
    ),
    # DeepEP's limits. That it is installed is seen on the nodes, before they begin (worker/engines/megatron.py).
    JobRule(
        "layout.dispatcher",
        MEGATRON,
        when(
            lambda job: _flex(job) and job.cluster.device == "cpu",
            "flex moves tokens by DeepEP, which runs on GPUs, and this job is for cpu",
        ),
        nearest="alltoall",
    ),
    JobRule(
        "layout.dispatcher",
        MEGATRON,
        when(
            lambda job: _flex(job) and job.train.precision == "fp32",
            "flex moves tokens by DeepEP, which takes them in bf16, and train.precision=fp32",
        ),
        nearest="alltoall",
    ),
    JobRule(
        "layout.expert_parallelism",
        MEGATRON,
        when(
            lambda job: _shared(job) and job.layout.dispatcher != "alltoall",
            "fssdp sends tokens to all who hold their experts, which no dispatcher but alltoall does",
        ),
        nearest="ep",
    ),
    JobRule(
        "layout.expert_parallelism",
        MEGATRON,
        when(
            lambda job: _shared(job) and job.model.capacity_factor,
            "fssdp spreads tokens where an expert has too many, and model.capacity_factor drops them",
        ),
        nearest="ep",
    ),
    JobRule(
        "layout.recompute",
        BOTH,
        when(
            lambda job: bool(job.layout.offload_activations) and job.layout.recompute == "full",
            "whole layers are computed again, and with layout.offload_activations above 0 tokens that would not be",
        ),
        nearest="none",
    ),
    JobRule(
        "layout.recompute_modules",
        BOTH,
        when(
            lambda job: (
                _swaps(job)
                and job.layout.recompute == "selective"
                and not {"mlp", "moe"}.issuperset(job.layout.options["recompute_modules"])
            ),
            "beside layout.offload_activations what may be computed again of all tokens is mlp and moe",
        ),
        nearest=("mlp",),
    ),
    JobRule(
        "layout.offload_activations",
        BOTH,
        when(
            lambda job: _swaps(job) and _moe(job) and bool(job.model.capacity_factor),
            "tokens come to experts in two parts, and model.capacity_factor counts them at once",
        ),
    ),
    JobRule(
        "layout.dispatcher",
        MEGATRON,
        when(
            lambda job: _swaps(job) and _moe(job) and job.layout.dispatcher != "alltoall",
            "with layout.offload_activations tokens come to experts in two parts, and other dispatchers than alltoall "
            "give both parts' gradients in one buffer",
        ),
        nearest="alltoall",
    ),
    JobRule("layout.recompute_modules", MEGATRON, _nothing_to_recompute, nearest=("core_attn",)),
    JobRule(
        "layout.zero_stage",
        MEGATRON,
        when(
            lambda job: job.layout.zero_stage not in (None, 1),
            "the megatron engine shards the optimizer's state and nothing else; "
            "layout.optimizer_replicas says over how many ranks",
        ),
        nearest=1,
    ),
    JobRule("layout.offload_optimizer", MEGATRON, _no_offload("offload_optimizer", "optimizer state"), nearest="none"),
    JobRule("layout.offload_parameters", MEGATRON, _no_offload("offload_parameters", "weights"), nearest="none"),
    *deepspeed_rules.JOB_RULES,
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


def _no_experts(axis: str) -> Reason:
    def reason(layout: Layout, job: JobSpec) -> str | None:
        degree = layout.degree(axis)
        return None if _moe(job) or degree == 1 else f"{axis}={degree}, but {job.model.name} has no experts"

    return reason


def _optimizer_replicas(name: str, ranks: Callable[[Layout], int]) -> Reason:
    def reason(layout: Layout, job: JobSpec) -> str | None:
        copies, spread = job.layout.optimizer_replicas or 1, ranks(layout)
        return None if spread % copies == 0 else f"optimizer_replicas={copies} does not divide {name}={spread}"

    return reason


def _nobody_to_dispatch_to(layout: Layout, job: JobSpec) -> str | None:
    if _flex(job) and layout.etp * layout.ep == 1:
        return "dispatcher=flex moves tokens between ranks, and etp*ep=1 leaves none to move"
    return None


def _cut_experts(layout: Layout, job: JobSpec) -> str | None:
    if _shared(job) and layout.etp > 1:
        return f"expert_parallelism=fssdp copies whole experts, and etp={layout.etp} cuts them"
    return None


def _stage_layers(layout: Layout, job: JobSpec) -> str | None:
    given, layers = layout.stage_layers, job.model.layers
    if given is None:
        return None if layers % layout.pp == 0 else f"pp={layout.pp} does not divide layers={layers}"
    return None if sum(given) == layers else f"stage_layers={list(given)} are {sum(given)}, not layers={layers}"


def _virtual_layers(layout: Layout, job: JobSpec) -> str | None:
    stages, layers = layout.pp * layout.vpp, job.model.layers
    if layers % stages == 0 or layout.vpp == 1:
        return None
    return f"pp*vpp={layout.pp}*{layout.vpp}={stages} does not divide layers={layers}"


def _zigzag_chunks(layout: Layout, job: JobSpec) -> str | None:
    chunks, length = 2 * layout.cp, job.train.sequence_length
    if layout.cp == 1 or length % chunks == 0:
        return None
    return f"2*cp=2*{layout.cp}={chunks} chunks, which balance causal attention, do not divide sequence_length={length}"


def _split_sequence(layout: Layout, job: JobSpec) -> str | None:
    parts, length = layout.tp * layout.cp, job.train.sequence_length
    if length % parts == 0:
        return None
    if layout.cp == 1:
        return f"tp={layout.tp} does not divide sequence_length={length}"
    return f"tp*cp={layout.tp}*{layout.cp}={parts} does not divide sequence_length={length}"


ATTENTION_RULES = (
    *deepspeed_rules.ATTENTION_RULES,
    Rule("layers", "pp", BOTH, _stage_layers),
    Rule("layers", "vpp", MEGATRON, _virtual_layers),
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
    Rule("sequence_length", "cp", MEGATRON, _zigzag_chunks),
    # Sequence parallelism, which goes with tp, splits the sequence too.
    Rule("sequence_length", "tp", MEGATRON, _split_sequence),
    Rule("global_batch", "dp", BOTH, _divides("dp", "global_batch", lambda job: job.train.global_batch)),
    Rule("optimizer_replicas", "dp", MEGATRON, _optimizer_replicas("dp*cp", lambda layout: layout.dp * layout.cp)),
)

EXPERT_RULES = (
    Rule("dense model", "ep", BOTH, _no_experts("ep")),
    Rule("dense model", "etp", BOTH, _no_experts("etp")),
    Rule("experts", "ep", BOTH, _divides("ep", "experts", lambda job: job.model.experts)),
    Rule("expert_ffn", "etp", BOTH, _divides("etp", "expert_ffn", lambda job: job.model.expert_ffn)),
    Rule("optimizer_replicas", "ep", MEGATRON, _optimizer_replicas("edp", lambda layout: layout.edp)),
    Rule("dispatcher", "ep", MEGATRON, _nobody_to_dispatch_to),
    Rule("expert_parallelism", "etp", BOTH, _cut_experts),
    *deepspeed_rules.EXPERT_RULES,
)


def _interleaved_groups(layout: Layout, job: JobSpec, micro_batches: int) -> str | None:
    if layout.vpp == 1 or micro_batches % layout.pp == 0:
        return None
    return f"vpp={layout.vpp} takes micro-batches in groups of pp={layout.pp}: {micro_batches} a step are no multiple"


BATCH_RULES: tuple[BatchRule, ...] = (BatchRule("micro-batches", "vpp", MEGATRON, _interleaved_groups),)
