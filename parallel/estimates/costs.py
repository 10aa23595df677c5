"""How long a training step takes, in seconds: operator by operator, collective by collective, on the slowest stage.

A stage's micro-batch is its layers' operators (operators.py) at the shapes of one rank and their collectives
(network.py). The schedule is 1F1B, interleaved or not (Narayanan et al. 2021): the slowest stage works without a pause
but for the time that a micro-batch needs through the others. Data-parallel collectives hide behind one micro-batch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from statistics import NormalDist

from jobs.architecture import ModelArchitecture
from parallel.estimates.hardware import Hardware
from parallel.estimates.layers import Cost, head, layer
from parallel.estimates.memory import Stage, stages
from parallel.estimates.network import Network
from parallel.estimates.software import Software, software
from parallel.estimates.workload import Workload
from parallel.layout import Layout

SENDING_PROCESSORS = 24
"""Streaming multiprocessors that DeepEP and HybridEP send and receive with (DeepEP's README; 16 to 32 in use)."""

VARIATION = 0.015
"""Standard deviation of equal devices' speed: in five clusters 8% lay between the whiskers of its distribution, which
are 5.4 standard deviations apart (Sinha et al., Not All GPUs Are Created Equal, SC 2022)."""

Costs = tuple[tuple[float, float, float], ...]


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

    @property
    def total(self) -> float:
        return sum((float(seconds) for seconds in vars(self).values()), 0.0)


@dataclass(frozen=True)
class _Pass:
    """A stage's micro-batch, forward and backward; `forward` and `backward` are their shares of compute and waiting."""

    compute: float
    launch: float
    tensor: float
    expert: float
    context: float
    pipeline: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.compute + self.launch + self.tensor + self.expert + self.context + self.pipeline


def estimate_time(workload: Workload, hardware: Hardware, run_by: Software | None = None) -> TimeEstimate:
    """Seconds of one step, forward to optimizer; `run_by` stands for what is known of workload.software."""
    ours = run_by or software(workload.software)
    network = Network(hardware, workload.devices_per_node)
    layout, micro_batches = workload.layout, workload.micro_batches
    kinds = _kinds(workload.model, layout)
    # Layers cost the same however many replicas and stages there are, and are kept by what they depend on.
    shape = Layout(tp=layout.tp, cp=layout.cp, dp=layout.ep * layout.etp, ep=layout.ep, etp=layout.etp, sp=layout.sp)
    costs = _parts(replace(workload, layout=shape, global_batch=workload.micro_batch * shape.dp), network, ours)
    passes = {stage: _pass(workload, stage, costs, network, ours) for stage, _ in kinds}
    every = sum(number * passes[stage].total for stage, number in kinds)

    def of_stage(stage: Stage) -> TimeEstimate:
        one = passes[stage]
        data, offload = _data(workload, stage, one, hardware, network, ours)
        return TimeEstimate(
            compute=micro_batches * one.compute,
            launch=micro_batches * one.launch,
            tensor=micro_batches * one.tensor,
            expert=micro_batches * one.expert,
            context=micro_batches * one.context,
            pipeline=micro_batches * one.pipeline,
            bubble=(every - one.total) / layout.vpp,
            data=data,
            optimizer=_optimizer(workload, stage, hardware),
            offload=offload,
            fixed=ours.step_seconds,
        )

    return max((of_stage(stage) for stage in passes), key=lambda estimate: estimate.total)


@lru_cache(maxsize=1 << 10)
def _kinds(model: ModelArchitecture, layout: Layout) -> tuple[tuple[Stage, int], ...]:
    """Stages of equal shape take equal time: one of each, and how many there are."""
    return tuple(Counter(stages(model, layout)).items())


def _pass(workload: Workload, stage: Stage, costs: Costs, network: Network, ours: Software) -> _Pass:
    dense_layers, moe_layers, heads = stage.dense_layers, stage.moe_layers, stage.is_last
    cost = Cost(*(dense_layers * dense + moe_layers * moe + heads * last for dense, moe, last in costs))
    layout = workload.layout
    slowest = _slowest(layout.world)
    sends = 0.0
    if layout.pp > 1:
        activation = workload.element * workload.tokens * workload.model.hidden / (layout.tp if layout.sp else 1)
        if not layout.sp and layout.tp > 1:
            activation /= layout.tp  # scattered over the group and gathered again behind the stage boundary
        sends = 2 * network.send(activation, layout.tp * layout.cp * layout.dp) * _sends_waited_for(workload, ours)
    host = network.hardware.launch_seconds * ours.launch * cost.kernels
    summed = 0.0
    if not ours.gradients_fused:  # read where the product wrote them, and added to their sum
        summed = (stage.dense_parameters + stage.expert_parameters) * (workload.element + 8)
    summing = summed / network.hardware.memory_bytes_per_second
    forward, backward = slowest * cost.forward, slowest * (cost.backward + summing)
    waits = _waits(host, forward + cost.collectives_forward) + _waits(2 * host, backward + cost.collectives_backward)
    compute, expert = forward + backward, cost.expert_forward + cost.expert_backward
    if workload.experts_overlap:
        # While tokens travel, the kernels that send them keep their share of the processors from computation.
        compute += min(1.0, SENDING_PROCESSORS / network.hardware.processors) * expert
        expert = max(0.0, expert - compute)
    return _Pass(
        compute=compute,
        launch=waits,
        tensor=cost.tensor_forward + cost.tensor_backward,
        expert=expert,
        context=cost.context_forward + cost.context_backward,
        pipeline=sends,
        forward=forward + cost.collectives_forward,
        backward=backward + cost.collectives_backward,
    )


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


@lru_cache(maxsize=1 << 12)
def _parts(workload: Workload, network: Network, ours: Software) -> Costs:
    """Each field of Cost: of a dense layer, of an MoE layer, of the head."""
    hardware = network.hardware
    parts = (*layer(workload, hardware, network, ours), head(workload, hardware, network, ours))
    return tuple(zip(*(vars(part).values() for part in parts), strict=True))


def _data(
    workload: Workload, stage: Stage, one: _Pass, hardware: Hardware, network: Network, ours: Software
) -> tuple[float, float]:
    """What is not hidden of data-parallel collectives, and of the traffic with the host."""
    layout, stages_apart = workload.layout, workload.zero_stage
    replicas = layout.dp * layout.cp

    def both(bytes_each: float, reduce: bool = False) -> float:
        collective = network.all_reduce if reduce else network.all_gather
        dense = collective(stage.dense_parameters * bytes_each, replicas, layout.tp)
        # Replicas of a shard of experts stand a whole expert-parallel group apart.
        experts = 0.0
        if stage.expert_parameters:
            experts = collective(stage.expert_parameters * bytes_each, layout.edp, layout.etp * layout.ep)
        return ours.data * (dense + experts)

    if stages_apart == 3:
        # Weights are gathered for forward and again for backward, gradients scattered, of each micro-batch (FSDP).
        gather, scatter = both(workload.element), both(workload.gradient_bytes)
        exposed = max(0.0, gather - ours.weights_hidden * one.forward)
        exposed += max(0.0, gather + scatter - ours.gradients_hidden * one.backward)
        exposed *= workload.micro_batches
    else:
        whole = ours.gradients_whole or stages_apart == 0
        gradients = both(4 if ours.gradients_whole else workload.gradient_bytes, reduce=whole)
        gradients *= workload.micro_batches if stages_apart == 2 else 1
        weights = both(workload.element) if stages_apart else 0.0
        exposed = max(0.0, gradients - ours.gradients_hidden * one.backward)
        exposed += max(0.0, weights - ours.weights_hidden * one.forward)
    shard = stage.dense_parameters / workload.shards + stage.expert_parameters / workload.expert_shards
    share = workload.optimizer_offloaded
    host = share * shard * (workload.gradient_bytes + workload.element) / hardware.host_link.bytes_per_second
    host += share * shard * 28 / hardware.host_adam_bytes_per_second
    if workload.weights_offloaded:
        traffic = 2 * workload.micro_batches * shard * workload.element
        host += max(0.0, traffic / hardware.host_link.bytes_per_second - workload.micro_batches * one.total)
    return exposed, host


def _optimizer(workload: Workload, stage: Stage, hardware: Hardware) -> float:
    """Adam, bound by memory: fp32 weight and moments read and written, fp32 gradient read, model's weight written.

    Before it gradients are read for their norm and scaled.
    """
    dense = stage.dense_parameters / (workload.shards if workload.zero_stage else 1)
    experts = stage.expert_parameters / (workload.expert_shards if workload.zero_stage else 1)
    bytes_each = (28 + workload.element) * (1 - workload.optimizer_offloaded) + 3 * workload.gradient_bytes
    return (dense + experts) * bytes_each / hardware.memory_bytes_per_second
