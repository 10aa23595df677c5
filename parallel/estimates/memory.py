"""What one rank holds while it trains, in bytes, stage by stage; and how likely that is more than a device has.

Sources: mixed-precision states as in ZeRO (Rajbhandari et al. 2020) with Megatron-Core's distributed optimizer;
activations in activations.py; 1F1B and its interleaved form as in Narayanan et al. 2021. How far real runs lie from the
sum is fitted by memory_fitting.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from math import erf, hypot, sqrt
from typing import NamedTuple

from parallel.estimates.activations import LayerBytes, layer_bytes
from parallel.estimates.copies import copies_bytes
from parallel.estimates.hardware import Hardware
from parallel.estimates.stages import Stage, in_flight, kinds, stages
from parallel.estimates.swapping import at_once, bytes_here, settled
from parallel.estimates.workload import Workload, kept_by
from parallel.layout import Layout

FITTED: dict[str, float] = json.loads((files("parallel.estimates") / "memory_fitted.json").read_text())
"""By memory_fitting.py, on split `calibrate` alone. slack: what torch's allocator holds beyond what is counted, in
pieces that nothing fits: a share of activations and workspace, since weights and their states are allocated once, and
logits are equal blocks each time. Standard deviations: spread_passing, a share of what comes and goes within a step,
and spread_held, of the rest. whole_logit_bytes: of a logit where the loss is torch's own."""

LIKELY_OUT = 0.5
"""Probability of running out of memory above which a layout is refused: missed and falsely refused weigh the same."""

LOGIT_ELEMENTS = {"parallel": 4, "fused": 2}
"""Of a logit, in elements of the weights' 2 bytes: itself, its gradient, and the fp32 softmax that the loss keeps where
it is not one kernel."""

CHUNK_LOGITS = 1 << 27
"""At once, where a head makes them by chunks and keeps the gradient of hidden states (kernels/cross_entropy.py)."""

COMMUNICATOR_SHARE = 0.175
"""Of a profile's reserve, which is measured with five communicators, what each of them takes: on an H200 0.67 of 3.84
GB (docs/planner), the context taking 0.5. On an A100 NCCL takes 0.54 GB for two ranks and 0.69 for more
(github.com/NVIDIA/nccl, issue 964)."""

HEAD_GRADIENT_ELEMENTS = 3
"""Of a weight of the head while its gradient is made: in the weights' precision and in fp32. With it, what SimuMax
recorded on split `calibrate` is met within 1%."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on a rank of one stage at the fullest moment of a step, part by part: the mean of what is expected.

    That moment is the turn from forward to backward, when all activations are there; or the optimizer's step, when none
    are (its first is as full as any: its states are counted from the beginning).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    """Alive for a moment: the widest block's gathered input and gradients, the largest weight's gradient, a layer
    computed again, ZeRO-3's gathered weights, copies of experts that ranks share."""
    update: int
    """Made by the optimizer's step where that is the fullest moment: fp32 copies of gradients kept in less."""
    overhead: int
    """What the device holds before the first tensor, and the allocator's slack."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def allocated(self) -> int:
        """Of tensors alone."""
        return self.total - self.overhead

    @property
    def passing(self) -> int:
        """What comes and goes within a step."""
        return self.activations + self.logits + self.workspace + self.update

    @property
    def spread(self) -> float:
        """Standard deviation of the total, bytes, as fitted."""
        return hypot(FITTED["spread_passing"] * self.passing, FITTED["spread_held"] * (self.total - self.passing))

    def p_out_of_memory(self, device_bytes: float) -> float:
        """That a device of so many bytes does not hold it, by a normal distribution."""
        return 0.5 * (1 + erf((self.total - device_bytes) / (sqrt(2) * self.spread)))


def estimate_memory(workload: Workload, device: Hardware) -> MemoryEstimate:
    """Bytes on a rank of the pipeline stage that holds most."""
    return MemoryEstimate(*max(_parts(workload, device, _unequal(workload)), key=sum))


def is_too_much(workload: Workload, device: Hardware) -> bool:
    """Whether running out of memory is likelier than not (LIKELY_OUT), quickly found: the mean is beyond."""
    return max(map(sum, _parts(workload, device, _unequal(workload)))) > device.memory_bytes


def stage_memory(workload: Workload, device: Hardware) -> list[MemoryEstimate]:
    """Bytes on a rank of each pipeline stage, first to last."""
    every = _held(workload, enumerate(stages(workload.model, workload.layout)))
    return [MemoryEstimate(*parts) for parts in _parts(workload, device, every)]


class _Held(NamedTuple):
    """What a rank of a stage holds all the time, whatever the micro-batch, bytes."""

    place: int
    """The stage's number, from 0."""
    stage: Stage
    weights: float
    gradients: float
    optimizer: float
    update: float
    """Not held: made by the optimizer's step."""


def _held(workload: Workload, asked: Iterable[tuple[int, Stage]]) -> tuple[_Held, ...]:
    """By some of the stages, each with its number."""
    element, sharded, gradient_bytes = workload.element, workload.zero_stage, workload.gradient_bytes
    # Mixed precision keeps an fp32 copy of the weights beside Adam's two moments; fp32 needs no copy.
    kept = 2 * workload.moment_bytes + (0 if workload.precision == "fp32" else 4)
    optimizer_bytes = kept * (1 - workload.optimizer_offloaded)
    found = []
    for place, stage in asked:
        parameters = stage.dense_parameters + stage.expert_parameters
        shard = stage.dense_parameters / workload.shards + stage.expert_parameters / workload.expert_shards
        weights = 0.0 if workload.weights_offloaded else (parameters if sharded < 3 else shard) * element
        gradients = (parameters if sharded < 2 else shard) * gradient_bytes
        optimizer = (shard if sharded >= 1 else parameters) * optimizer_bytes
        found.append(_Held(place, stage, weights, gradients, optimizer, shard * 4 if gradient_bytes < 4 else 0.0))
    return tuple(found)


@kept_by(
    *("model", "layout", "zero_stage", "optimizer_replicas", "optimizer_offloaded", "weights_offloaded"),
    *("precision", "gradient_bytes", "moment_bytes"),
)
def _unequal(workload: Workload) -> tuple[_Held, ...]:
    """By the first of each kind of stage: of equal ones it has most micro-batches in flight."""
    return _held(workload, ((kind.first, kind.stage) for kind in kinds(workload)))


class _Passing(NamedTuple):
    """What comes and goes with one micro-batch, bytes: kept by a layer of each kind, and alive for a moment."""

    dense: float
    moe: float
    workspace: float
    head: float


@kept_by(
    *("model", "sequence_length", "micro_batch", "precision", "recompute", "attention_kernel", "fused_norm"),
    *("activation_copies", "loss", "own_kernels", "load", "zero_stage"),
    *("layout.tp", "layout.cp", "layout.sp", "layout.ep", "layout.etp"),
)
def _passing(workload: Workload) -> _Passing:
    model, tp, element = workload.model, workload.layout.tp, workload.element
    nothing = LayerBytes(0.0)
    dense = layer_bytes(workload, moe=False) if model.dense_layers else nothing
    moe = layer_bytes(workload, moe=True) if model.moe_layers else nothing
    logit_bytes = FITTED["whole_logit_bytes"]
    if workload.loss != "whole":
        logit_bytes = LOGIT_ELEMENTS[workload.loss] * element / tp
    logits = workload.tokens * model.vocab * logit_bytes
    if workload.own_kernels and tp == 1:
        logits = element * (min(CHUNK_LOGITS, workload.tokens * model.vocab) + workload.tokens * model.hidden)
    head = max(
        logits,
        model.embedding_parameters / tp * HEAD_GRADIENT_ELEMENTS * element,
    )
    return _Passing(dense.kept, moe.kept, _workspace(workload) + max(dense.again, moe.again), head)


def _parts(workload: Workload, device: Hardware, asked: tuple[_Held, ...]) -> list[tuple[int, ...]]:
    """Fields of MemoryEstimate for some of the stages."""
    if workload.swapping is not None:
        workload = settled(workload, device)
    layout, micro_batches = workload.layout, workload.micro_batches
    dense, moe, workspace, head = _passing(workload)
    copies = copies_bytes(workload, device)
    workspace += copies
    reserved = device.reserved_bytes * (1 - COMMUNICATOR_SHARE * _groups(layout).count(1))
    found: list[tuple[int, ...]] = []
    for place, stage, weights, gradients, optimizer, update in asked:
        layers = stage.dense_layers * dense + stage.moe_layers * moe
        activations, block = in_flight(layout, place, micro_batches) * layers, workspace
        if workload.swapping is not None:
            activations, block = bytes_here(workload, device, place, stage, _workspace(workload, at_once(workload)))
            block += copies
        # The head's turn is over before a block's begins: the larger of the two counts.
        logits, alive = (head, 0.0) if stage.is_last and head > block else (0.0, block)
        if update > activations + logits + alive:
            activations = logits = alive = 0.0
        else:
            update = 0.0
        overhead = reserved + FITTED["slack"] * (activations + alive + update)
        parts = weights, gradients, optimizer, activations, logits, alive, update, overhead
        found.append(tuple(map(round, parts)))
    return found


def _groups(layout: Layout) -> tuple[int, ...]:
    """Sizes of the five groups in which a rank communicates; the profile's reserve has a communicator for each."""
    return layout.tp, layout.cp, layout.pp, layout.dp * layout.cp, layout.ep * layout.etp


def _workspace(workload: Workload, share: float = 1.0) -> float:
    """Bytes alive for a moment at the turn from forward to backward, but for what is computed again.

    share: of the tokens, those that a block computes at once.
    """
    model, layout = workload.model, workload.layout
    widest = max(model.ffn, model.shared_expert_ffn, model.head_dim * model.heads) / layout.tp
    matrices = model.gated + 1
    largest_weight = max(
        matrices * model.hidden * model.ffn / layout.tp,
        matrices * model.hidden * model.expert_ffn / layout.etp,
    )
    # Where SwiGLU is one kernel that keeps what it is given alone, its result is gone before its gradient is made.
    live = matrices if workload.own_kernels else matrices + 1
    elements = workload.tokens * (2 * model.hidden + share * live * widest) + largest_weight
    if workload.zero_stage == 3:
        # A layer's weights are made whole, and by prefetching those of the next.
        experts = model.experts / layout.ep * model.expert_parameters / layout.etp if model.moe_layers else 0.0
        shared = model.router_parameters + model.shared_expert_parameters if model.moe_layers else 0
        dense = model.ffn_parameters if model.dense_layers else 0
        layer = (model.attention_parameters + max(dense, shared)) / layout.tp + experts
        elements += 2 * max(layer, model.embedding_parameters / layout.tp)
    return workload.element * elements
