"""A layer's operators and collectives at the shapes of one rank, a micro-batch, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from parallel.estimates.copies import busiest_rank, limits_of, shared
from parallel.estimates.hardware import Hardware
from parallel.estimates.network import Network
from parallel.estimates.operators import Seconds, attention, linear, moved
from parallel.estimates.software import Software
from parallel.estimates.workload import Workload

BATCH_KERNELS = 30
"""Started for a micro-batch beside its layers: tokens, labels, masks and positions are copied and shared out,
embeddings looked up, added and dropped, the loss masked and averaged (Megatron-LM's pretrain_gpt.py, counted)."""


class Cost(NamedTuple):
    """Seconds of a micro-batch on one rank, and the kernels that its forward starts."""

    forward: float = 0.0
    backward: float = 0.0
    kernels: float = 0.0
    tensor_forward: float = 0.0
    tensor_backward: float = 0.0
    expert_forward: float = 0.0
    expert_backward: float = 0.0
    context_forward: float = 0.0
    context_backward: float = 0.0

    @property
    def collectives_forward(self) -> float:
        return self.tensor_forward + self.expert_forward + self.context_forward

    @property
    def collectives_backward(self) -> float:
        return self.tensor_backward + self.expert_backward + self.context_backward

    @property
    def again(self) -> Cost:
        """What it adds where backward computes it once more. Kernels of backward are twice forward's: half is added."""
        return Cost(
            backward=self.forward,
            kernels=self.kernels / 3,
            tensor_backward=self.tensor_forward,
            expert_backward=self.expert_forward,
            context_backward=self.context_forward,
        )


Parts = dict[str, Cost]
"""Of a layer, by what may be computed again."""


def layer_parts(workload: Workload, hardware: Hardware, network: Network, ours: Software) -> tuple[Parts, Parts]:
    """Of a dense layer and of an MoE layer (nothing where the model has none), nothing of them computed again."""
    model = workload.model
    attended = attention_parts(workload, hardware, network, ours)
    dense = moe = Parts()
    if model.dense_layers:
        dense = {**attended, "mlp": _mlp(workload, hardware, network, ours, model.ffn)}
    if model.moe_layers:
        window = sum(part.forward for part in attended.values())
        moe = {**attended, **_experts(workload, hardware, network, ours, window)}
        if model.shared_expert_ffn:
            moe["shared_experts"] = _mlp(workload, hardware, network, ours, model.shared_expert_ffn)
    return dense, moe


def layer(parts: Parts, recompute: frozenset[str]) -> Cost:
    """A layer of such parts, some of which backward computes again."""
    again = parts if "layer" in recompute else [name for name in parts if name in recompute]
    if "moe" in recompute:
        again = [*again, *(name for name in ("moe_act", "shared_experts") if name in parts and name not in again)]
    return total([*parts.values(), *(parts[name].again for name in again)])


def computed_by_token(parts: Parts, share: float) -> Cost:
    """What backward adds where it computes this share of the tokens again: all of a layer but attention itself."""
    once = total(part.again for name, part in parts.items() if name != "core_attn")
    return Cost(*(share * seconds for seconds in once))


def total(costs: Iterable[Cost]) -> Cost:
    return Cost(*map(sum, zip(Cost(), *costs, strict=True)))


def head(workload: Workload, hardware: Hardware, network: Network, ours: Software) -> Cost:
    """The output projection and the loss; logits are read and written as 16 bits, then as fp32 (4 and 3 times).

    Fused, the loss of a whole head reads them and writes their gradient over them, as 16 bits, in forward.
    """
    model, tp = workload.model, workload.layout.tp
    share = model.vocab // tp
    # The head stays in 16 bits where layers are in 8.
    precision = "bf16" if workload.precision == "fp8" else workload.precision
    made = linear(hardware, precision, workload.tokens, share, model.hidden)
    if _fused(workload, hardware) and tp == 1:
        loss = Seconds(moved(hardware, workload.tokens * share, 2, 1).forward, kernels=1)
    else:
        loss = moved(hardware, workload.tokens * share, 8 * ours.memory, 5)
    return total((_cost(made, loss, ours), _block(workload, network, ours), Cost(kernels=BATCH_KERNELS)))


def _fused(workload: Workload, hardware: Hardware) -> bool:
    """Whether the engine's kernels do what others leave to many: a CPU has none of them."""
    return workload.own_kernels and hardware.processors > 1


def _cost(products: Seconds, memory: Seconds, ours: Software) -> Cost:
    """Of products and kernels that move memory; the latter's residual is in their passes already."""
    return Cost(
        forward=ours.compute * products.forward + memory.forward,
        backward=ours.compute * products.backward + memory.backward,
        kernels=products.kernels + memory.kernels,
    )


def _block(workload: Workload, network: Network, ours: Software) -> Cost:
    """Collectives of a tensor-parallel block of column- and row-parallel products.

    Without sequence parallelism an all-reduce of its output forward, of its input's gradient backward (Shoeybi et al.
    2019). With it (Korthikanti et al. 2022) an all-gather and a reduce-scatter each way, and the input gathered once
    more for the weight gradients, which hides behind the input gradient's product.
    """
    layout = workload.layout
    if layout.tp == 1:
        return Cost()
    volume = workload.element * workload.tokens * workload.model.hidden
    if layout.sp:
        each = 2 * ours.network * network.all_gather(volume, layout.tp, 1)
        if ours.blocks_overlap:
            each /= layout.tp  # one chunk of tp has nothing to hide behind
    else:
        each = ours.network * network.all_reduce(volume, layout.tp, 1)
    return Cost(tensor_forward=each, tensor_backward=each, kernels=2)


def attention_parts(workload: Workload, hardware: Hardware, network: Network, ours: Software) -> dict[str, Cost]:
    """By what may be computed again: latents' up-projections, the other projections, scores, the layer's norms.

    Multi-latent attention: DeepSeek-V2, arXiv 2405.04434, section 2.1.
    """
    model, layout = workload.model, workload.layout
    tokens, element = workload.tokens, workload.element
    heads, kv_heads = model.heads // layout.tp, max(1, model.kv_heads // layout.tp)

    def product(out: int, inner: int) -> Seconds:
        return linear(hardware, workload.precision, tokens, out, inner)

    parts = {}
    if model.is_multi_latent:
        # Down to latents, which every rank of the group makes whole; up from them, to this rank's heads.
        query, key = model.head_dim + model.rope_head_dim, model.kv_lora_rank + model.rope_head_dim
        down = product(key, model.hidden)
        if model.q_lora_rank:
            down += product(model.q_lora_rank, model.hidden)
        up = product(heads * query, model.q_lora_rank or model.hidden)
        up += product(heads * (model.head_dim + model.value_head_dim), model.kv_lora_rank)
        # Keys are put together of what is each head's own and the rotary part that all share.
        width = heads * (2 * query + model.value_head_dim)
        parts["mla_up_proj"] = _cost(up, moved(hardware, tokens * width, 2 * ours.memory, 6, element), ours)
        projections, copies = down, moved(hardware, tokens * (key + model.q_lora_rank), 2 * ours.memory, 2, element)
        value_dim, head_dim = model.value_head_dim, query
    else:
        width = (heads + 2 * kv_heads) * model.head_dim
        projections = product(width, model.hidden)
        # Rotary positions and copies between layouts: of queries, keys and values, read and written.
        copies = moved(hardware, tokens * width, 2 * ours.memory, 3, element)
        value_dim = head_dim = model.head_dim
    projections += product(model.hidden, heads * value_dim)
    inner = attention(
        hardware,
        workload.precision,
        workload.attention_kernel,
        workload.micro_batch,
        workload.sequence_length // layout.cp,
        workload.sequence_length,
        heads,
        head_dim,
        value_dim,
    )
    outside = tokens // layout.tp if layout.sp else tokens
    norm_passes, norm_kernels = (2, 1) if workload.fused_norm else (14, 6)
    norms = moved(hardware, outside * model.hidden, 2 * norm_passes * ours.memory, 2 * norm_kernels, element)
    residuals = moved(hardware, outside * model.hidden, 2 * 3 * ours.memory, 2, element)
    return parts | {
        "attention": total((_cost(projections, copies + residuals, ours), _block(workload, network, ours))),
        "core_attn": total((_cost(inner, Seconds(), ours), _context(workload, network, ours))),
        "layernorm": _cost(Seconds(), norms, ours),
    }


def _context(workload: Workload, network: Network, ours: Software) -> Cost:
    """What ranks that share a sequence exchange.

    Gathered or passed round, keys and values travel once forward and once more backward, and their gradients back.
    Ulysses sends queries, keys, values and the output all to all, and the gradients of the four.
    """
    layout, model = workload.layout, workload.model
    if layout.cp == 1:
        return Cost()
    keys = 2 * model.kv_heads * model.head_dim / layout.tp
    if workload.context_attention == "ulysses":
        volume = workload.element * workload.tokens * (keys + 2 * model.heads * model.head_dim / layout.tp)
        each = ours.network * network.all_to_all(volume, layout.cp, layout.tp)
        return Cost(context_forward=each, context_backward=each, kernels=4)
    each = ours.network * network.all_gather(
        workload.element * workload.tokens * layout.cp * keys, layout.cp, layout.tp
    )
    return Cost(context_forward=each, context_backward=2 * each, kernels=2)


def _mlp(workload: Workload, hardware: Hardware, network: Network, ours: Software, ffn: int) -> Cost:
    """A feed-forward block of all tokens: SwiGLU of three matrices, or GELU of two."""
    model, width = workload.model, max(1, ffn // workload.layout.tp)
    gates = 2 if model.gated else 1
    products = linear(hardware, workload.precision, workload.tokens, gates * width, model.hidden)
    products += linear(hardware, workload.precision, workload.tokens, model.hidden, width)
    activation = moved(hardware, workload.tokens * width, (gates + 1) * ours.memory, gates, workload.element)
    return total((_cost(products, activation, ours), _block(workload, network, ours)))


def busiest_load(workload: Workload, hardware: Hardware, window_seconds: float) -> float:
    """Tokens of the busiest expert-parallel rank over the mean; less where ranks share experts.

    window_seconds: forward of attention, behind which experts are copied.
    """
    if workload.layout.ep == 1 or workload.expert_parallelism == "ep":
        return busiest_rank(workload)
    return shared(workload, limits_of(workload, hardware, window_seconds)).busiest


def _experts(
    workload: Workload, hardware: Hardware, network: Network, ours: Software, window_seconds: float
) -> dict[str, Cost]:
    """Router, dispatch, the experts of the busiest rank, combination.

    Each rank sends top_k copies of its tokens; an expert tensor-parallel group gathers those of all its ranks, and
    scatters the sums. Copies of experts that ranks share come and go behind attention, forward and backward.
    """
    model, layout, element = workload.model, workload.layout, workload.element
    tokens = workload.tokens // layout.tp
    load = busiest_load(workload, hardware, window_seconds)
    if model.capacity_factor:
        load = min(load, model.capacity_factor) if workload.load != "balanced" else model.capacity_factor
    copies = tokens * model.top_k * load
    local = max(1, model.experts // layout.ep)
    received = round(copies * layout.etp)
    gates, width = (2 if model.gated else 1), max(1, model.expert_ffn // layout.etp)
    rows = max(1, received // local)
    products = linear(hardware, workload.precision, rows, gates * width, model.hidden, local)
    products += linear(hardware, workload.precision, rows, model.hidden, width, local)
    router = moved(hardware, tokens * model.experts, 6 * ours.memory, 10, 4)
    # Sorted by expert before they are sent and again where they arrive, and both ways back: read and written.
    fused = _fused(workload, hardware)
    sorting = moved(hardware, copies * model.hidden, 8 if fused else 8 * ours.memory, 12, element)
    activation = moved(hardware, received * width, (gates + 1) * ours.memory, gates, element)
    if fused:
        activation = Seconds()
    gate = linear(hardware, workload.precision, tokens, model.experts, model.hidden)
    volume = element * copies * model.hidden
    spread = network.all_to_all(volume, layout.ep, layout.etp, model.top_k if workload.dispatcher == "flex" else 0)
    gathered = network.all_gather(volume * layout.etp, layout.etp, 1)
    sent = 2 * ours.network
    sending = Cost(
        expert_forward=sent * spread,
        expert_backward=sent * spread,
        tensor_forward=sent * gathered,
        tensor_backward=sent * gathered,
        kernels=4,
    )
    if workload.expert_parallelism == "fssdp" and layout.ep > 1:
        # All ranks tell one another how many tokens each expert has of each.
        told = network.all_gather(4 * layout.ep * model.experts, layout.ep, layout.etp)
        sending = total((sending, Cost(expert_forward=ours.network * told, kernels=2)))
    return {
        "moe": total((_cost(products + gate, router + sorting, ours), sending)),
        "moe_act": _cost(Seconds(), activation, ours),
    }
