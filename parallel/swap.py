"""Which fraction of tokens has its activations swapped to host memory, the rest being computed again.

After MEMO (arXiv 2407.12117): a layer's input and its attention's output always go to the host, of what else backward
needs a fraction alpha of the tokens, as much as the link carries while a layer computes and as host memory holds:

    alpha = clamp(min((B T - S_in - S_attn) / S_rest, (M_host / n - S_in - S_attn) / S_rest), 0, 1)

with B the link's bytes a second, T a layer's forward, n the layers on the host. MEMO has one micro-batch in flight: its
last two layers stay, n = layers - 2. Where more are in flight backward does not begin with the layer that forward made
last: every layer goes. Links carry both directions at once, so that neither waits for the other. How many layers are on
the device meanwhile is `parallel.estimates.swapping`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Literal

from jobs.errors import InputError
from parallel.estimates.activations import computed_again, layer_parts, most_routed_rows, routed_rows
from parallel.estimates.stages import in_flight, stages
from parallel.estimates.workload import Workload

SLICE = 16384
"""Tokens of a layer's part that are computed at a time, at most (parallel/offload.py)."""

Rows = Literal["expected", "most"]
"""That experts receive: as many as `workload.load` says, or all that routing can send to one rank."""

Limit = Literal["link", "host", "nothing"]


@dataclass(frozen=True)
class Host:
    """One machine's side of swapping."""

    bytes_per_second: float
    """Of a link between host and devices, each direction, beside traffic of the other."""
    link_ranks: int
    """Ranks that share a link."""
    memory_bytes: float
    """For what is swapped."""
    memory_ranks: int
    """Ranks that share the memory, equally."""

    @property
    def rank_bytes_per_second(self) -> float:
        return self.bytes_per_second / self.link_ranks

    @property
    def rank_memory_bytes(self) -> float:
        return self.memory_bytes / self.memory_ranks


@dataclass(frozen=True)
class Skeletal:
    """What backward needs of one layer's forward, bytes of a micro-batch on one rank."""

    layer_input: float
    attention: float
    """Its output, and the sums of rows that a flash kernel's backward takes: nothing of both is made by token."""
    rest: float

    @property
    def mandatory(self) -> float:
        return self.layer_input + self.attention

    @property
    def total(self) -> float:
        return self.mandatory + self.rest


@dataclass(frozen=True)
class Layers:
    """Layers of one kind on a stage: how many of a micro-batch, what each keeps, seconds of its forward."""

    number: int
    kept: Skeletal
    seconds: float


@dataclass(frozen=True)
class SwappedLayer:
    """One layer at a plan's alpha, bytes of a micro-batch on one rank. The parts are all that it keeps."""

    mandatory: float
    swapped: float
    """Beside what is mandatory."""
    recomputed: float
    slack_seconds: float
    """Of its forward when its copy has ended; below 0 the link stalls each layer for as long."""

    @property
    def copied(self) -> float:
        return self.mandatory + self.swapped


@dataclass(frozen=True)
class SwapPlan:
    """What is swapped on one rank of a stage."""

    alpha: float
    limit: Limit
    """That keeps alpha below 1."""
    layers: tuple[SwappedLayer, ...]
    """One of each kind that the stage has: dense, MoE."""
    host_bytes: float
    """Of all layers of all micro-batches in flight."""
    notice: str = ""
    """Where even alpha = 0 stalls: what is copied, and how long both take."""


def skeletal(workload: Workload, moe: bool, rows: Rows = "expected") -> Skeletal:
    """Of one layer, dense or MoE. What the workload recomputes in any case is not kept; of whole layers, all but their
    input.

    Attention that writes its scores keeps them whole, since no token's can be made alone.
    """
    routed = (routed_rows if rows == "expected" else most_routed_rows)(workload) if moe else 0.0
    parts = layer_parts(workload, moe, routed)
    # Query, key and value are joined of tokens that go and others: they lie apart from what they were made of.
    for name in ("unrotated", *computed_again(parts, workload.recompute)):
        parts[name] = 0.0
    model, layout = workload.model, workload.layout
    width = model.heads * (model.value_head_dim if model.is_multi_latent else model.head_dim)
    output = workload.element * workload.micro_batch * workload.sequence_length / layout.cp * width / layout.tp
    # Of the two residuals that a layer keeps the first is its input.
    layer_input, attention = parts["residual"] / 2, output + parts["core_attn"]
    if "layer" in workload.recompute:
        return Skeletal(layer_input, 0.0, 0.0)
    return Skeletal(layer_input, attention, sum(parts.values()) - layer_input - attention)


def plan_swap(
    workload: Workload,
    stage: int,
    host: Host,
    dense_seconds: float,
    moe_seconds: float = 0.0,
    rows: Rows = "expected",
) -> SwapPlan:
    """Of a rank of pipeline stage `stage`, from 0; the seconds are of one layer's forward of a micro-batch, by kind.

    InputError where host memory does not hold what is mandatory.
    """
    held = stages(workload.model, workload.layout)[stage]
    kinds = [
        Layers(number, skeletal(workload, moe, rows), seconds)
        for number, moe, seconds in ((held.dense_layers, False, dense_seconds), (held.moe_layers, True, moe_seconds))
        if number
    ]
    return swap_layers(kinds, in_flight(workload.layout, stage, workload.micro_batches), host)


def swap_layers(kinds: Sequence[Layers], flying: float, host: Host) -> SwapPlan:
    """Of a stage whose layers are of these kinds, in the order in which forward comes to them.

    flying: micro-batches in flight, in units of all the stage's layers. InputError as of `plan_swap`.
    """
    hosted = layers_hosted([kind.number for kind in kinds], flying)
    mandatory = sum(number * kind.kept.mandatory for number, kind in zip(hosted, kinds, strict=True))
    rest = sum(number * kind.kept.rest for number, kind in zip(hosted, kinds, strict=True))
    memory, bandwidth = host.rank_memory_bytes, host.rank_bytes_per_second
    if mandatory > memory:
        needed = ceil(mandatory * host.memory_ranks)
        raise InputError(
            "host.memory_bytes",
            host.memory_bytes,
            f"inputs and attention outputs of {sum(hosted):g} layers take {mandatory:,.0f} bytes a rank, "
            f"each of {host.memory_ranks} ranks has {memory:,.0f}",
            needed,
        )
    # A copy goes beside the next layer: where kinds meet, beside the other's forward.
    shortest = min(kind.seconds for kind in kinds)
    windows = [shortest if kind is not kinds[-1] else kind.seconds for kind in kinds]
    copied = [(kind.kept, seconds) for kind, seconds, number in zip(kinds, windows, hosted, strict=True) if number]
    by_link = min((_share(bandwidth * seconds - kept.mandatory, kept.rest) for kept, seconds in copied), default=inf)
    by_host = _share(memory - mandatory, rest)
    alpha = max(0.0, min(by_link, by_host, 1.0))
    limit: Limit = "nothing" if alpha == 1 else "link" if by_link <= by_host else "host"
    layers = tuple(
        SwappedLayer(
            kind.kept.mandatory,
            alpha * kind.kept.rest,
            (1 - alpha) * kind.kept.rest,
            seconds - (kind.kept.mandatory + alpha * kind.kept.rest) / bandwidth if number else seconds,
        )
        for kind, seconds, number in zip(kinds, windows, hosted, strict=True)
    )
    notices = (
        f"{kept.mandatory:,.0f} bytes of each layer take {kept.mandatory / bandwidth:.3g} s at {bandwidth:,.0f} bytes "
        f"a second, its forward {seconds:.3g} s: {kept.mandatory / bandwidth - seconds:.3g} s of stall"
        for kept, seconds in copied
        if kept.mandatory > bandwidth * seconds
    )
    return SwapPlan(
        alpha=alpha,
        limit=limit,
        layers=layers,
        host_bytes=mandatory + alpha * rest,
        notice="; ".join(notices),
    )


def layers_hosted(numbers: Sequence[int], flying: float) -> list[float]:
    """Of the layers of each kind, over all micro-batches in flight, those whose activations go to the host.

    Alone, the two layers last made stay; of the last kind, and where it has one layer only, of the one before.
    """
    hosted: list[float] = []
    staying = 2 if flying <= 1 else 0
    for number in reversed(numbers):
        hosted.insert(0, max(0.0, number * flying - staying))
        staying = max(0, staying - number)
    return hosted


def _share(left: float, rest: float) -> float:
    """Of the rest, that what is left holds; below 0 where nothing is."""
    if rest:
        return left / rest
    return inf if left >= 0 else -inf
