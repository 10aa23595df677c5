"""How long a training step takes, in seconds: operator by operator, collective by collective, on the slowest stage.

A stage's micro-batch is its layers' operators (operators.py) at the shapes of one rank and their collectives
(network.py). The schedule is 1F1B, interleaved or not (Narayanan et al. 2021): the slowest stage works without a pause
but for the time that a micro-batch needs through the others. Data-parallel collectives hide behind one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

from parallel.estimates.hardware import Hardware
from parallel.estimates.layers import Cost, Parts, computed_by_token, head, layer, layer_parts
from parallel.estimates.layers import total as summed
from parallel.estimates.network import Network
from parallel.estimates.software import Software, software
from parallel.estimates.stages import Kind, Stage, kinds
from parallel.estimates.swapping import LayerSeconds, recomputed_share, settled, stall_seconds
from parallel.estimates.workload import Workload, kept_by

SENDING_PROCESSORS = 24
"""Streaming multiprocessors that DeepEP and HybridEP send and receive with (DeepEP's README; 16 to 32 in use)."""

VARIATION = 0.015
"""Standard deviation of equal devices' speed: in five clusters 8% lay between the whiskers of its distribution, which
are 5.4 standard deviations apart (Sinha et al., Not All GPUs Are Created Equal, SC 2022)."""

BY_STEP = ("zero_stage", "optimizer_replicas", "optimizer_offloaded", "weights_offloaded")
"""Fields of a workload on which only what is done once a step depends, or beside the layers' own work."""


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of one optimizer step, part by part."""

    compute: float
    launch: float
    """The device waiting for the host to start kernels."""
    tensor: float
    """Tensor-parallel collectives, attention's and the experts'."""
    expert: float
    """All-to-all of tokens to experts and back."""
    context: float
    """Keys and values, or heads, exchanged over the ranks that share a sequence."""
    pipeline: float
    """Activations and their gradients between stages."""
    bubble: float
    data: float
    """Gradients reduced and weights gathered over data-parallel ranks: what is not hidden."""
    optimizer: float
    offload: float
    """Gradients to the host and weights back."""
    fixed: float
    """Of a step, whatever its size."""
    unexplained: float = 0.0
    """What measured steps say beyond these parts (evidence/calibration.py); below 0 where they were shorter."""
    recomputed: float = 0.0
    """Tokens whose activations are not swapped, computed again; their collectives are with the others."""
    stall: float = 0.0
    """Waiting for activations on their way to the host and back."""

    @property
    def total(self) -> float:
        return sum((float(seconds) for seconds in vars(self).values()), 0.0)


class _Pass(NamedTuple):
    """A stage's micro-batch, forward and backward; `forward` and `backward` are their shares of compute and waiting."""

    compute: float
    launch: float
    tensor: float
    expert: float
    context: float
    forward: float
    backward: float
    again: float
    """Computing tokens again whose activations were not swapped."""

    @property
    def total(self) -> float:
        """But for what is sent to other stages, and stalls."""
        return self.compute + self.launch + self.tensor + self.expert + self.context + self.again


class _Once(NamedTuple):
    """Seconds of what a stage does beside micro-batches' own work, before anything of it is hidden."""

    gradients: float
    weights: float
    optimizer: float
    host: float
    streamed: float
    """For weights that live on the host, of each micro-batch."""


def estimate_time(workload: Workload, hardware: Hardware, run_by: Software | None = None) -> TimeEstimate:
    """Seconds of one step, forward to optimizer; `run_by` stands for what is known of workload.software."""
    ours = run_by or software(workload.software)
    if workload.swapping is not None:
        workload = settled(workload, hardware)
    network = Network(hardware, workload.devices_per_node)
    layout, micro_batches = workload.layout, workload.micro_batches
    alike = kinds(workload)
    passes, totals, sends, stalls = _passes(workload, alike, network, ours)
    every = sum(kind.number * total for kind, total in zip(alike, totals, strict=True))
    slowest: tuple[float, ...] = ()
    longest = -1.0
    for kind, one, total, stall in zip(alike, passes, totals, stalls, strict=True):
        once = _once(workload, kind.stage, hardware, ours)
        bubble = (every - total) / layout.vpp
        data = _exposed(workload, one, once, ours)
        offload = once.host + max(0.0, micro_batches * (once.streamed - total))
        seconds = micro_batches * total + bubble + data + once.optimizer + offload
        if seconds > longest:
            longest = seconds
            work = (one.compute, one.launch, one.tensor, one.expert, one.context, sends)
            slowest = (
                *(micro_batches * part for part in work),
                bubble,
                data,
                once.optimizer,
                offload,
                ours.step_seconds,
                0.0,
                micro_batches * one.again,
                micro_batches * stall,
            )
    return TimeEstimate(*slowest)


def least_time(workload: Workload, hardware: Hardware) -> float:
    """Seconds that a step takes at least: its schedule, without what is done once a step. It is quickly found."""
    ours = software(workload.software)
    if workload.swapping is not None:
        workload = settled(workload, hardware)
    alike = kinds(workload)
    _, totals, _, _ = _passes(workload, alike, Network(hardware, workload.devices_per_node), ours)
    longest = max(totals)
    every = sum(kind.number * total for kind, total in zip(alike, totals, strict=True))
    # A hair less, for sums in another order.
    return (workload.micro_batches * longest + (every - longest) / workload.layout.vpp) * (1 - 1e-9)


def _passes(
    workload: Workload, alike: tuple[Kind, ...], network: Network, ours: Software
) -> tuple[list[_Pass], list[float], float, list[float]]:
    """Of each kind of stage: a micro-batch, its seconds with sends and stalls; those of sends, and those of stalls."""
    shape = _shape(workload, network.hardware, ours)
    passes = [shape.of(kind.stage, workload.layout.world) for kind in alike]
    sends, stalls = _sends(workload, network, ours), [0.0] * len(alike)
    if workload.swapping is not None:
        stalls = [stall_seconds(workload, network.hardware, kind, shape.layer_seconds) for kind in alike]
    return passes, [one.total + sends + stall for one, stall in zip(passes, stalls, strict=True)], sends, stalls


class _Shape:
    """What the layers of a micro-batch cost on one rank, and stages of so many of them."""

    def __init__(self, workload: Workload, hardware: Hardware, ours: Software) -> None:
        self._launch = hardware.launch_seconds * ours.launch
        # Where it is not fused, a gradient is read where the product wrote it, and added to the sum.
        self._sum = 0.0 if ours.gradients_fused else (workload.element + 8) / hardware.memory_bytes_per_second
        sending = min(1.0, SENDING_PROCESSORS / hardware.processors)
        self._overlap = sending if workload.experts_overlap else 0.0
        dense, moe, last = _parts(workload, hardware, ours)
        costs = layer(dense, workload.recompute), layer(moe, workload.recompute)
        self._again = (0.0, 0.0)
        if workload.swapping is not None:
            share = recomputed_share(workload)
            again = computed_by_token(dense, share), computed_by_token(moe, share)
            self._again = again[0].backward, again[1].backward
            costs = summed((costs[0], again[0])), summed((costs[1], again[1]))
        self.layer_seconds = tuple(
            LayerSeconds(cost.forward + cost.collectives_forward, cost.backward + cost.collectives_backward)
            for cost in costs
        )
        """Of a dense layer and of an MoE layer."""
        self._costs = tuple(zip(*costs, last, strict=True))
        self._stages: dict[tuple[Stage, int], _Pass] = {}

    def of(self, stage: Stage, world: int) -> _Pass:
        found = self._stages.get((stage, world))
        if found is None:
            found = self._stages[stage, world] = self._pass(stage, _slowest(world))
        return found

    def _pass(self, stage: Stage, slowest: float) -> _Pass:
        dense_layers, moe_layers, heads = stage.dense_layers, stage.moe_layers, stage.is_last
        cost = Cost(*(dense_layers * dense + moe_layers * moe + heads * last for dense, moe, last in self._costs))
        host = self._launch * cost.kernels
        summing = (stage.dense_parameters + stage.expert_parameters) * self._sum
        forward, backward = slowest * cost.forward, slowest * (cost.backward + summing)
        waits = _waits(host, forward + cost.collectives_forward)
        waits += _waits(2 * host, backward + cost.collectives_backward)
        again = slowest * (dense_layers * self._again[0] + moe_layers * self._again[1])
        compute, expert = forward + backward - again, cost.expert_forward + cost.expert_backward
        if self._overlap:
            # While tokens travel, the kernels that send them keep their share of the processors from computation.
            compute += self._overlap * expert
            expert = max(0.0, expert - compute)
        return _Pass(
            compute=compute,
            launch=waits,
            tensor=cost.tensor_forward + cost.tensor_backward,
            expert=expert,
            context=cost.context_forward + cost.context_backward,
            forward=forward + cost.collectives_forward,
            backward=backward + cost.collectives_backward,
            again=again,
        )


_SHAPED_BY = (
    *(field.name for field in fields(Workload) if field.name not in (*BY_STEP, "layout", "global_batch")),
    *(f"layout.{degree}" for degree in ("tp", "cp", "ep", "etp", "sp")),
)
"""On which the cost of a micro-batch depends: not on how many replicas and stages there are."""


@kept_by(*_SHAPED_BY)
def _shape(workload: Workload, hardware: Hardware, ours: Software) -> _Shape:
    return _Shape(workload, hardware, ours)


@kept_by(*(name for name in _SHAPED_BY if name != "recompute"))
def _parts(workload: Workload, hardware: Hardware, ours: Software) -> tuple[Parts, Parts, Cost]:
    """Of a dense layer, of an MoE layer, and the head."""
    given = workload, hardware, Network(hardware, workload.devices_per_node), ours
    return *layer_parts(*given), head(*given)


def _sends(workload: Workload, network: Network, ours: Software) -> float:
    """Of a micro-batch: seconds that a stage waits for the one before it and, backward, for the one behind."""
    layout = workload.layout
    if layout.pp == 1:
        return 0.0
    # Without sequence parallelism too it is scattered over the group, and gathered again behind the stage boundary.
    activation = workload.element * workload.tokens * workload.model.hidden / layout.tp
    return 2 * network.send(activation, layout.tp * layout.cp * layout.dp) * _sends_waited_for(workload, ours)


def _sends_waited_for(workload: Workload, ours: Software) -> float:
    """Of a micro-batch, each way. It is received once forward, and its gradient once backward.

    An interleaved schedule sends it once a virtual stage. It hides what is sent beside the other virtual stages' work,
    but none while it fills and drains: 2 (p - 1) + (v - 1) p sends of the first stage's m v (Megatron-Core's
    schedules.py; Narayanan et al. 2021, section 2.2).
    """
    pp, vpp, micro_batches = workload.layout.pp, workload.layout.vpp, workload.micro_batches
    if vpp == 1:
        return 1 - ours.sends_hidden
    filling = 2 * (pp - 1) + (vpp - 1) * pp
    return min(filling, micro_batches * vpp) / micro_batches


@cache
def _slowest(devices: int) -> float:
    """Seconds of the slowest of so many equal devices over their mean: all wait for it in every step.

    Expected maximum of normal deviates (Blom 1958), whose spread is VARIATION.
    """
    if devices == 1:
        return 1.0
    return 1 + VARIATION * NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))


def _waits(host: float, device: float) -> float:
    """Seconds that the device waits for a host which runs ahead of it, but not at every moment."""
    return float((host**3 + device**3) ** (1 / 3) - device)


@kept_by("model", "layout", *BY_STEP, "gradient_bytes", "precision", "devices_per_node")
def _once(workload: Workload, stage: Stage, hardware: Hardware, ours: Software) -> _Once:
    """Data-parallel collectives, the optimizer, and the traffic with the host."""
    network, layout = Network(hardware, workload.devices_per_node), workload.layout
    element, gradient_bytes, zero_stage = workload.element, workload.gradient_bytes, workload.zero_stage
    replicas = layout.dp * layout.cp

    def both(bytes_each: float, reduce: bool = False) -> float:
        collective = network.all_reduce if reduce else network.all_gather
        dense = collective(stage.dense_parameters * bytes_each, replicas, layout.tp)
        # Replicas of a shard of experts stand a whole expert-parallel group apart.
        experts = 0.0
        if stage.expert_parameters:
            experts = collective(stage.expert_parameters * bytes_each, layout.edp, layout.etp * layout.ep)
        return ours.data * (dense + experts)

    shard = stage.dense_parameters / workload.shards + stage.expert_parameters / workload.expert_shards
    stepped = shard if zero_stage else stage.dense_parameters + stage.expert_parameters
    share, link = workload.optimizer_offloaded, hardware.host_link.bytes_per_second
    host = share * shard * ((gradient_bytes + element) / link + 28 / hardware.host_adam_bytes_per_second)
    # Adam is bound by memory: fp32 weight and moments read and written, fp32 gradient read, model's weight written.
    # Before it gradients are read for their norm and scaled.
    optimizer = stepped * ((28 + element) * (1 - share) + 3 * gradient_bytes) / hardware.memory_bytes_per_second
    whole = ours.gradients_whole or zero_stage == 0
    return _Once(
        gradients=both(4 if ours.gradients_whole and zero_stage != 3 else gradient_bytes, whole and zero_stage != 3),
        weights=both(element) if zero_stage else 0.0,
        optimizer=optimizer,
        host=host,
        streamed=2 * shard * element / link if workload.weights_offloaded else 0.0,
    )


def _exposed(workload: Workload, one: _Pass, once: _Once, ours: Software) -> float:
    """What is not hidden of data-parallel collectives."""
    gradients, weights = once.gradients, once.weights
    forward, backward = ours.weights_hidden * one.forward, ours.gradients_hidden * one.backward
    if workload.zero_stage == 3:
        # Weights are gathered for forward and again for backward, gradients scattered, of each micro-batch (FSDP).
        return workload.micro_batches * (max(0.0, weights - forward) + max(0.0, weights + gradients - backward))
    gradients *= workload.micro_batches if workload.zero_stage == 2 else 1
    return max(0.0, gradients - backward) + max(0.0, weights - forward)
