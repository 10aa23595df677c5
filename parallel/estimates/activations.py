"""What a layer keeps of a micro-batch until its backward, on one rank, in bytes.

After Korthikanti et al. 2022 (arXiv 2205.05198), rewritten for RMSNorm, GQA and multi-latent attention, SwiGLU and MoE,
without dropout but where scores are written. What tensor parallelism does not divide (norms, residuals, latents) is
divided by sequence parallelism alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jobs.architecture import ModelArchitecture
from parallel.estimates.copies import busiest_rank
from parallel.estimates.workload import Workload

GRADIENT_BYTES = {"flash": 0.0, "flash1": 0.0, "fused_softmax": 2.0, "unfused": 10.0}
"""Of a score whose gradient is made: a fused softmax's backward writes where its input lies; torch's takes the gradient
of the probabilities in 16 bits and in fp32, and gives that of the scores in fp32."""


@dataclass(frozen=True)
class LayerBytes:
    """Of one layer of a kind: `kept` until backward, and `again`, what is alive while backward computes it again.

    With the latter, gradients of written scores.
    """

    kept: float
    again: float = 0.0


def routed_rows(workload: Workload) -> float:
    """Copies of a micro-batch's tokens that the busiest rank's experts receive in one MoE layer.

    Each rank sends top_k copies of its tokens; an expert tensor-parallel group gathers those of all its ranks. With a
    capacity factor an expert takes no more than that times the mean.
    """
    model, layout = workload.model, workload.layout
    factor = busiest_rank(workload)
    if model.capacity_factor:
        factor = min(factor, model.capacity_factor)
    return workload.tokens / layout.tp * model.top_k * layout.etp * factor


def most_routed_rows(workload: Workload) -> float:
    """The same if every token goes to that rank's experts, as far as top_k and the capacity let it."""
    model, layout = workload.model, workload.layout
    factor = layout.ep * min(1.0, model.experts / layout.ep / model.top_k)
    if model.capacity_factor:
        factor = min(factor, model.capacity_factor)
    return workload.tokens / layout.tp * model.top_k * layout.etp * factor


def layer_bytes(workload: Workload, moe: bool) -> LayerBytes:
    """One layer, dense or MoE, of a micro-batch."""
    layout, recompute = workload.layout, workload.recompute
    parts = layer_parts(workload, moe, routed_rows(workload) if moe else 0.0)
    turn = _score_elements(workload) * GRADIENT_BYTES[workload.attention_kernel]
    whole = sum(parts.values())
    if "layer" in recompute:
        row = workload.element * workload.micro_batch * workload.sequence_length / layout.cp
        return LayerBytes((row / layout.tp if layout.sp else row) * workload.model.hidden, whole + turn)
    dropped = {name: parts[name] for name in computed_again(parts, recompute)}
    return LayerBytes(whole - sum(dropped.values()), max(dropped.values(), default=0.0) + turn)


def computed_again(parts: Iterable[str], recompute: frozenset[str]) -> list[str]:
    """Of a layer's parts, those that backward makes again, where it does not make all of the layer."""
    gone = [name for name in parts if name in recompute]
    if "moe" in recompute:
        gone += [name for name in ("shared_experts", "router", "experts", "moe_act") if name in parts]
    return gone


def layer_parts(workload: Workload, moe: bool, routed: float) -> dict[str, float]:
    """What one layer keeps, by what keeps it, nothing computed again.

    routed: rows that the experts of an MoE layer receive.
    """
    model, layout, element = workload.model, workload.layout, workload.element
    tp, etp, sp = layout.tp, layout.etp, layout.sp
    attention, copies = workload.attention_kernel, workload.activation_copies
    tokens = workload.micro_batch * workload.sequence_length / layout.cp
    row = element * tokens  # of one element of each token
    apart = row / tp if sp else row  # of what only sequence parallelism divides
    hidden = model.hidden
    # Of what matrix products alone keep, their input: Transformer Engine keeps it in 8 bits where it multiplies so.
    factor = 1 / element if workload.precision == "fp8" else 1.0
    parts = {
        "residual": apart * 2 * hidden,
        "layernorm": factor * apart * 2 * hidden,
        "norm_fp32": 0.0 if workload.fused_norm else (4 + element) / element * apart * 2 * hidden,
        **_attention(model, row, apart, tp),
        "core_attn": _scores(attention, _score_elements(workload), tokens, model, tp),
        # FlashAttention 1 takes query, key and value in one tensor: a copy.
        "packed": row * (model.heads + 2 * model.kv_heads) * model.head_dim / tp if attention == "flash1" else 0.0,
        # Queries and keys as they were before they were rotated, which lie in one tensor with value.
        "unrotated": row * (model.heads + model.kv_heads) * model.head_dim / tp if workload.own_kernels else 0.0,
    }
    # Of a feed-forward block's width: what the activation takes, and what it makes.
    taken, made = (2, 1 + copies) if model.gated else (1, 1)
    if not moe:
        parts["mlp"] = row * (taken + made - 1 + factor) * model.ffn / tp
    else:
        parts["shared_experts"] = row * (taken + made - 1 + factor) * model.shared_expert_ffn / tp
        parts["router"] = 4 * 3 * model.experts * (tokens / tp if sp else tokens)
        parts["experts"] = element * routed * (factor * hidden + taken * model.expert_ffn / etp)
        # The router's weights multiply what the activation gives: where that is a kernel of its own, it is kept too.
        parts["moe_act"] = element * routed * (made - 1 + factor + (copies > 0)) * model.expert_ffn / etp
    return parts


def _score_elements(workload: Workload) -> float:
    """Attention scores of a micro-batch on one rank."""
    layout, sequence = workload.layout, workload.sequence_length
    return workload.micro_batch * workload.model.heads / layout.tp * sequence * sequence / layout.cp


def _attention(model: ModelArchitecture, row: float, apart: float, tp: int) -> dict[str, float]:
    """Query, key, value and output; of multi-latent attention the latents too, which every rank keeps whole."""
    if not model.is_multi_latent:
        return {"attention": row * 2 * (model.heads + model.kv_heads) * model.head_dim / tp}
    latent = model.q_lora_rank + model.kv_lora_rank + model.rope_head_dim
    key_query = 2 * (model.head_dim + model.rope_head_dim)
    return {
        "latent": apart * latent,
        "mla_up_proj": row * model.heads * (key_query + model.value_head_dim) / tp,
        "attention": row * model.heads * model.value_head_dim / tp,
    }


def _scores(attention: str, scores: float, tokens: float, model: ModelArchitecture, tp: int) -> float:
    """What attention itself keeps: a flash kernel fp32 sums of rows; else probabilities.

    Written: softmax's output, a dropout mask of a byte, its output: 5 bytes a score (Korthikanti et al. 2022); where
    softmax is a kernel of its own it keeps fp32 too, and nothing of dropout but its mask: 7.
    """
    if attention in ("flash", "flash1"):
        return 4.0 * tokens * model.heads / tp
    return scores * (5.0 if attention == "fused_softmax" else 7.0)
