"""Activations in host memory (parallel/offload.py): which share of the tokens goes there, what stays, what waits.

The closed form of parallel/swap.py gives the share where it is to be chosen. What is on the device is counted as
parallel/offload.py goes about it; five layers on an H200 were measured so (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from math import ceil, floor, inf
from typing import NamedTuple

from jobs.errors import InputError
from parallel.estimates.activations import computed_again, layer_parts, routed_rows
from parallel.estimates.hardware import Hardware
from parallel.estimates.layers import layer_parts as layer_costs
from parallel.estimates.layers import total
from parallel.estimates.network import Network
from parallel.estimates.software import software
from parallel.estimates.stages import Kind, Stage, in_flight, kinds
from parallel.estimates.workload import Swapping, Workload, kept_by
from parallel.swap import SLICE, Host, Skeletal, layers_hosted, plan_swap, skeletal

HOST_SHARE = 0.8
"""Of the memory that is free when a rank begins, for all ranks of its machine together."""

ALONE, BESIDE_OTHERS = 3, 4
"""Layers whose activations are on the device at the turn from forward to backward. Alone the last two stay, and what is
given up when the layer after the next begins is the one before them; where other micro-batches are in flight, forward
leaves two and backward has two, the one that it computes and the next."""

FP32 = 4


class LayerSeconds(NamedTuple):
    """Of a micro-batch in one layer, collectives included."""

    forward: float
    backward: float


def host_of(device: Hardware) -> Host:
    """A device's share of its machine. Memory that is not known is not what limits."""
    memory = HOST_SHARE * device.host_memory_bytes if device.host_memory_bytes else inf
    return Host(device.host_link.bytes_per_second, 1, memory, 1)


def settled(workload: Workload, device: Hardware) -> Workload:
    """The step with its share of swapped tokens as a number, or with all activations staying."""
    swapping = workload.swapping
    if swapping is None or swapping.share != "auto":
        return workload
    return _settled(workload, device)


@kept_by(*(field.name for field in fields(Workload)))
def _settled(workload: Workload, device: Hardware) -> Workload:
    assert workload.swapping is not None
    try:
        share = closed_form(workload, device)
    except InputError:
        return replace(workload, swapping=None)
    return replace(workload, swapping=Swapping(share, workload.swapping.leaves))


def closed_form(workload: Workload, device: Hardware) -> float:
    """The share of tokens that link and host memory allow on every stage, to hundredths.

    InputError where host memory does not hold what always goes there.
    """
    dense, moe = forward_seconds(workload, device)
    plans = [plan_swap(workload, kind.first, host_of(device), dense, moe) for kind in kinds(workload)]
    return 0.0 if "layer" in workload.recompute else floor(100 * min(plan.alpha for plan in plans)) / 100


def forward_seconds(workload: Workload, device: Hardware) -> tuple[float, float]:
    """Of a micro-batch in a dense layer and in an MoE layer."""
    network = Network(device, workload.devices_per_node)
    every = (total(parts.values()) for parts in layer_costs(workload, device, network, software(workload.software)))
    dense, moe = (cost.forward + cost.collectives_forward for cost in every)
    return dense, moe


def notices(workload: Workload, device: Hardware) -> list[str]:
    """What whoever has activations swapped must know, with the numbers: where copies stall or find no room.

    Of a step as it is asked for: its share may be auto.
    """
    if workload.swapping is None or not workload.swapping.leaves:
        return []
    step = settled(workload, device)
    shown = f"layout.offload_activations={workload.swapping.share}"
    room = host_of(device).rank_memory_bytes
    if step.swapping is None:
        least = replace(workload, swapping=Swapping(0.0))
        needed = max(hosted_bytes(least, kind.first, kind.stage) for kind in kinds(least))
        return [
            f"{shown}: all activations stay: what goes to the host in any case takes {needed / 1e9:,.2f} GB a rank, "
            f"and host memory has {room / 1e9:,.2f} GB for each"
        ]
    needed = max(hosted_bytes(step, kind.first, kind.stage) for kind in kinds(step))
    found = []
    if room == inf and needed:
        found.append(
            f"{shown}: {needed / 1e9:,.2f} GB of host memory a rank are wanted, and {device.name} tells of none"
        )
    elif needed > room:
        found.append(
            f"{shown}: {needed / 1e9:,.2f} GB a rank go to the host, whose memory has {room / 1e9:,.2f} GB for each: "
            "layers that find no room stay on the device"
        )
    seconds = forward_seconds(step, device)
    for moe, forward in enumerate(seconds if needed else ()):
        if any((kind.stage.moe_layers if moe else kind.stage.dense_layers) for kind in kinds(step)):
            copy = copy_seconds(step, device, bool(moe))
            if copy > forward:
                size = _copied(skeletal(step, bool(moe)), share_of(step))
                found.append(
                    f"{shown}: {'an MoE' if moe else 'a dense'} layer's {size / 1e6:,.1f} MB take {copy * 1e3:,.2f} ms "
                    f"over the link, and the next layer's forward, which hides it, {forward * 1e3:,.2f} ms"
                )
    return found


def share_of(workload: Workload) -> float:
    """Of the tokens whose activations go to the host beside inputs and attention outputs; of a settled step."""
    assert workload.swapping is not None
    share = workload.swapping.share
    assert share != "auto", "a step is settled before it is estimated"
    return 0.0 if "layer" in workload.recompute else share


def recomputed_share(workload: Workload) -> float:
    """Of the tokens, those that are computed again by token."""
    return 0.0 if "layer" in workload.recompute else 1 - share_of(workload)


def at_once(workload: Workload) -> float:
    """Share of the tokens that backward has in one block of a layer: a slice of the swapped ones, or of the others."""
    share = share_of(workload)
    return max(_slice(workload, share), _slice(workload, 1 - share))


def bytes_here(workload: Workload, device: Hardware, place: int, stage: Stage, workspace: float) -> tuple[float, float]:
    """Activations that a rank of a stage holds on its device, and what is alive there for a moment.

    workspace: of a block that has `at_once` of the tokens.
    """
    share, rest = share_of(workload), 1 - share_of(workload)
    counts = [(number, moe) for number, moe in ((stage.dense_layers, False), (stage.moe_layers, True)) if number]
    if not counts:
        return 0.0, workspace
    flying = in_flight(workload.layout, place, workload.micro_batches)
    layers = [_Layer.of(workload, moe) for _, moe in counts]
    kept = [layer.kept(share) for layer in layers]
    every = flying * sum(number * size for (number, _), size in zip(counts, kept, strict=True))
    here = min(every, (ALONE if flying <= 1 else BESIDE_OTHERS) * max(kept))
    hosted = hosted_bytes(workload, place, stage)
    if workload.swapping is not None and not workload.swapping.leaves:
        here += hosted
    else:
        # Layers that find no room in host memory stay.
        short = max(0.0, hosted - host_of(device).rank_memory_bytes)
        here = min(every, here + ceil(short / max(kept)) * max(kept)) if short else here
    alive = max(
        max(
            workspace + _slice(workload, share) * layer.whole + at_once(workload) * layer.dropped,
            # What of the block that came after attention was on the device is gone.
            layer.attention_turn + rest * layer.projected - share * layer.block,
        )
        for layer in layers
    )
    return here, alive


def hosted_bytes(workload: Workload, place: int, stage: Stage) -> float:
    """Of all layers of all micro-batches in flight, as it would be were there room."""
    share = share_of(workload)
    counts = [(number, moe) for number, moe in ((stage.dense_layers, False), (stage.moe_layers, True)) if number]
    hosted = layers_hosted([number for number, _ in counts], in_flight(workload.layout, place, workload.micro_batches))
    copied = [_copied(skeletal(workload, moe), share) for _, moe in counts]
    return sum(number * size for number, size in zip(hosted, copied, strict=True))


def stall_seconds(workload: Workload, device: Hardware, kind: Kind, seconds: Sequence[LayerSeconds]) -> float:
    """That a micro-batch waits on a stage for copies: each goes beside one other layer, forward and backward.

    seconds: of a dense layer and of an MoE layer.
    """
    stage, flying = kind.stage, in_flight(workload.layout, kind.first, workload.micro_batches)
    present = [(number, moe) for number, moe in ((stage.dense_layers, False), (stage.moe_layers, True)) if number]
    hosted = layers_hosted([number for number, _ in present], flying)
    waited = 0.0
    for number, (_, moe) in zip(hosted, present, strict=True):
        if number:
            copy = copy_seconds(workload, device, moe)
            # Where kinds meet, a copy goes beside the other's pass.
            forward = min(seconds[other].forward for _, other in present)
            backward = min(seconds[other].backward for _, other in present)
            waited += number / flying * (max(0.0, copy - forward) + max(0.0, copy - backward))
    return waited


def copy_seconds(workload: Workload, device: Hardware, moe: bool) -> float:
    """Of what a layer sends to the host, one way."""
    link = device.host_link
    return link.latency_seconds + _copied(skeletal(workload, moe), share_of(workload)) / link.bytes_per_second


def _copied(kept: Skeletal, share: float) -> float:
    return kept.mandatory + share * kept.rest


def _slice(workload: Workload, share: float) -> float:
    """Share of the tokens that are computed again at a time."""
    layout = workload.layout
    length = workload.sequence_length / layout.cp / (layout.tp if layout.sp else 1)
    others = (1 - share) * length
    return others / ceil(others / SLICE) / length if others >= 1 else 0.0


class _Layer(NamedTuple):
    """Bytes of a micro-batch in one layer on one rank."""

    skeletal: Skeletal
    projections: float
    """Query, key and value."""
    projected: float
    """With what they are made of: all that attention's backward has beside its output."""
    block: float
    """All else that is kept of tokens."""
    whole: float
    """All that is made by token."""
    dropped: float
    """That the workload recomputes in any case."""
    attention_turn: float
    """Gradients, while attention's are made: of query, key and value, once more of the query as a sum in fp32, of
    attention's output, and of the residual stream; and its output, where whole layers are computed again."""

    @classmethod
    def of(cls, workload: Workload, moe: bool) -> _Layer:
        model, layout = workload.model, workload.layout
        again = workload.recompute - {"layer"}
        plain = replace(workload, recompute=again)
        made, kept = skeletal(plain, moe), skeletal(workload, moe)
        parts = layer_parts(workload, moe, routed_rows(workload) if moe else 0.0)
        row = workload.element * workload.micro_batch * workload.sequence_length / layout.cp
        stream = (row / layout.tp if layout.sp else row) * model.hidden
        query = row * model.heads * model.head_dim / layout.tp
        projections = query + 2 * row * model.kv_heads * model.head_dim / layout.tp
        projected = projections + parts["layernorm"] / 2
        turn = projections + query * (1 + FP32 / workload.element) + stream
        if "layer" in workload.recompute:
            turn += made.attention
        dropped = max((parts[name] for name in computed_again(parts, again)), default=0.0)
        return cls(kept, projections, projected, max(0.0, made.rest - projected), made.rest, dropped, turn)

    def kept(self, share: float) -> float:
        """On the device. Query, key and value, where part of them is, have the place of all."""
        joined = (1 - share) * self.projections if share else 0.0
        return self.skeletal.mandatory + share * self.skeletal.rest + joined
