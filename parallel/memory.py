"""What one rank holds while it trains: a first analytical estimate, in bytes, of the fullest pipeline stage.

Sources: mixed-precision states as in ZeRO (Rajbhandari et al. 2020) with Megatron-Core's distributed optimizer;
activations after Korthikanti et al. 2022, rewritten for RMSNorm, GQA, SwiGLU and MoE, without dropout, with a fused
attention that keeps no scores, of recomputation the full one only; 1F1B as in Narayanan et al. 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from jobs.architecture import ModelArchitecture
from jobs.spec import JobSpec
from parallel.hardware import hardware
from parallel.layout import Layout

EXPERT_LOAD = 1.25
"""Tokens of the busiest expert-parallel rank over the mean: what a balancing loss leaves. An assumption."""

ALLOCATOR_SLACK = 0.07
"""What torch's allocator reserves above what is allocated: 3 to 7% in SimuMax's records of Megatron-LM on 8 GPUs."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on a rank of the fullest stage, part by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    """Alive for a moment: the widest block's gathered input and gradients, the largest weight's gradient."""
    overhead: int
    """What the device holds before the first tensor, and the allocator's slack."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Stage:
    """What a pipeline stage holds: numbers of layers, and one rank's parameters, by where they are reduced."""

    dense_layers: int
    moe_layers: int
    is_last: bool
    dense_parameters: int
    """Reduced over DP x CP."""
    expert_parameters: int
    """Reduced over EDP."""


@lru_cache(maxsize=1 << 10)
def stages(model: ModelArchitecture, layout: Layout) -> tuple[Stage, ...]:
    """The pipeline's stages, first to last; with virtual stages, which are dealt out in turn.

    Layers that are left over go one each to the virtual stages after the first, which has the embedding.
    """
    parts = layout.pp * layout.vpp
    per_chunk, over = divmod(model.layers, parts)
    starts = [per_chunk * part + min(over, max(0, part - 1)) for part in range(parts + 1)]
    starts[-1] = model.layers
    every_layer = (
        model.attention_split_parameters // layout.tp + model.attention_replicated_parameters + model.norm_parameters
    )
    dense_ffn = model.ffn_parameters // layout.tp
    gate = model.hidden * model.shared_expert_gate
    moe_ffn = model.router_parameters + (model.shared_expert_parameters - gate) // layout.tp + gate
    experts = model.experts // layout.ep * model.expert_parameters // layout.etp
    table = model.embedding_parameters // layout.tp
    found = []
    for index in range(layout.pp):
        is_first, is_last = index == 0, index == layout.pp - 1
        held = [(starts[part], starts[part + 1]) for part in range(index, parts, layout.pp)]
        per_stage = sum(end - start for start, end in held)
        dense = sum(max(0, min(end, model.dense_layers) - start) for start, end in held)
        moe = per_stage - dense
        # The head is a table of its own; tied, the last stage still needs its copy unless it is the first as well.
        tables = is_first + (is_last and not (is_first and model.tied_embeddings))
        found.append(
            Stage(
                dense_layers=dense,
                moe_layers=moe,
                is_last=is_last,
                dense_parameters=per_stage * every_layer
                + dense * dense_ffn
                + moe * moe_ffn
                + tables * table
                + is_last * model.hidden,
                expert_parameters=moe * experts,
            )
        )
    return tuple(found)


def activation_bytes(job: JobSpec, layout: Layout, micro_batch: int) -> tuple[int, int]:
    """What one dense and one MoE layer keep of a micro-batch for their backward (sequence parallelism with tp > 1)."""
    model, element = job.model, element_bytes(job)
    tokens = micro_batch * job.train.sequence_length // layout.cp  # seen by each tensor-parallel group
    attention = 2 * model.hidden + _attention_width(model)
    dense = tokens * element * (attention + 2 * model.hidden + 3 * model.ffn) // layout.tp
    if not model.is_moe:
        return dense, 0
    shared = tokens * element * (attention + 2 * model.hidden + 3 * model.shared_expert_ffn) // layout.tp
    router = tokens * 4 * 3 * model.experts // layout.tp
    routed = routed_tokens(job, layout, micro_batch)
    expert = routed * element * (model.hidden + 3 * model.expert_ffn // layout.etp)
    return dense, shared + router + round(expert)


def routed_tokens(job: JobSpec, layout: Layout, micro_batch: int) -> float:
    """Token copies that the busiest rank's experts receive of a micro-batch, in one MoE layer.

    Each rank sends top_k copies of its tokens; an expert tensor-parallel group gathers those of all its ranks.
    """
    tokens = micro_batch * job.train.sequence_length / (layout.tp * layout.cp)
    return tokens * job.model.top_k * layout.etp * (EXPERT_LOAD if layout.ep > 1 else 1.0)


def estimate_memory(job: JobSpec, layout: Layout, micro_batch: int) -> MemoryEstimate:
    """Bytes on a rank of the pipeline stage that holds most."""
    return max(stage_memory(job, layout, micro_batch), key=lambda estimate: estimate.total)


def stage_memory(job: JobSpec, layout: Layout, micro_batch: int) -> list[MemoryEstimate]:
    """Bytes on a rank of each pipeline stage, first to last."""
    model, element = job.model, element_bytes(job)
    device = hardware(job.cluster.hardware, job.cluster.devices_per_node)
    kept_dense, kept_moe = dense_layer, moe_layer = activation_bytes(job, layout, micro_batch)
    micro_batches = job.train.global_batch // (layout.dp * micro_batch)
    tokens = micro_batch * job.train.sequence_length // layout.cp
    widest = max(model.ffn, model.shared_expert_ffn, model.head_dim * model.heads) // layout.tp
    largest_weight = max(
        model.embedding_parameters // layout.tp,
        2 * model.hidden * model.ffn // layout.tp,
        2 * model.hidden * model.expert_ffn // layout.etp,
    )
    workspace = element * (tokens * (2 * model.hidden + 3 * widest) + largest_weight)
    if job.layout.recompute == "full":
        # A layer keeps its input; while it is recomputed, one holds all that its backward needs.
        workspace += max(dense_layer, moe_layer)
        kept_dense = kept_moe = element * tokens * model.hidden // layout.tp
    # bf16 keeps fp32 gradients, and an fp32 copy of the weights beside Adam's two moments; fp32 needs no copy.
    optimizer_bytes = 12 if job.train.precision == "bf16" else 8
    estimates = []
    for index, stage in enumerate(stages(model, layout)):
        parameters = stage.dense_parameters + stage.expert_parameters
        shard = stage.dense_parameters / (layout.dp * layout.cp) + stage.expert_parameters / layout.edp
        shard = min(parameters, shard * job.layout.optimizer_replicas)
        held = _held(job, parameters, shard)
        layers = stage.dense_layers * kept_dense + stage.moe_layers * kept_moe
        # Logits in the model's precision with their gradient, and the fp32 softmax that the loss keeps.
        logits = tokens * model.vocab // layout.tp * (2 * element + 4) if stage.is_last else 0
        allocated = {
            "weights": round(held["weights"] * element),
            "gradients": round(held["gradients"] * 4),
            "optimizer": round(held["optimizer"] * optimizer_bytes),
            "activations": round(_in_flight(layout, index, micro_batches) * layers),
            "logits": logits,
            "workspace": workspace + _gathered(job, layout) * element,
        }
        slack = round(ALLOCATOR_SLACK * sum(allocated.values()))
        estimates.append(MemoryEstimate(**allocated, overhead=device.reserved_bytes + slack))
    return estimates


def _held(job: JobSpec, parameters: float, shard: float) -> dict[str, float]:
    """Elements of weights, gradients and optimizer state on the device, of which ZeRO shards the last one to three."""
    options = job.layout
    held = {
        "weights": parameters if options.zero_stage < 3 else shard,
        "gradients": parameters if options.zero_stage < 2 else shard,
        "optimizer": parameters if options.zero_stage < 1 else shard,
    }
    if job.cluster.device == "cuda":  # a CPU's memory is its device's
        if options.offload_optimizer != "none":
            held["optimizer"] = 0
        if options.offload_parameters != "none":
            held["weights"] = 0
    return held


def _gathered(job: JobSpec, layout: Layout) -> int:
    """Elements that ZeRO-3 makes whole at once: a layer's, and by prefetching those of the next."""
    if job.layout.zero_stage < 3:
        return 0
    model = job.model
    experts = model.experts // layout.ep * model.expert_parameters // layout.etp if model.moe_layers else 0
    shared = model.router_parameters + model.shared_expert_parameters if model.moe_layers else 0
    dense = model.ffn_parameters if model.dense_layers else 0
    layer = (model.attention_parameters + max(dense, shared)) // layout.tp + experts
    return 2 * max(layer, model.embedding_parameters // layout.tp)


def _in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of all its layers (Narayanan et al. 2021)."""
    if layout.vpp == 1:
        return min(micro_batches, layout.pp - stage)
    chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(micro_batches * layout.vpp, chunks) / layout.vpp


def element_bytes(job: JobSpec) -> int:
    """Bytes of a weight or an activation."""
    return 2 if job.train.precision == "bf16" else 4


def _attention_width(model: ModelArchitecture) -> int:
    """Elements a token's attention keeps besides its input: query, key, value, output (and the latent vectors)."""
    if not model.is_multi_latent:
        return 2 * (model.heads + model.kv_heads) * model.head_dim
    latent = model.q_lora_rank + model.kv_lora_rank + model.rope_head_dim
    return latent + 2 * model.heads * (model.head_dim + model.rope_head_dim + model.value_head_dim)
