"""How long a training step takes: a first analytical estimate, in seconds, of the slowest stage. Nothing overlaps.

Compute is model FLOPs at the rate a device achieves, plus the memory traffic and the launches that do not hide behind
them. Collectives are rings over the slower of the links they cross (Thakur et al. 2005; alpha-beta model). The
schedule is 1F1B, idle for (p - 1) / (v m) of its work (Narayanan et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.spec import JobSpec
from parallel.hardware import Hardware, Link
from parallel.layout import Layout
from parallel.memory import EXPERT_LOAD, Stage, activation_bytes, element_bytes, routed_tokens, stages


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of one optimizer step, part by part."""

    compute: float
    launch: float
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
    """Gradients reduced and weights gathered over data-parallel ranks."""
    optimizer: float

    @property
    def total(self) -> float:
        return sum((float(seconds) for seconds in vars(self).values()), 0.0)


@dataclass(frozen=True)
class Network:
    """The links of a cluster as a group of ranks sees them: `size` ranks, `stride` apart in rank order."""

    hardware: Hardware
    devices_per_node: int

    def all_gather(self, total_bytes: float, size: int, stride: int) -> float:
        """Ring all-gather to, or reduce-scatter of, `total_bytes` on each rank: (n-1)/n S/B + (n-1) alpha."""
        link = self._ring_link(size, stride)
        return (size - 1) * (total_bytes / size / link.bytes_per_second + link.latency_seconds)

    def all_to_all(self, bytes_per_rank: float, size: int, stride: int) -> float:
        """Each rank sends `bytes_per_rank` in equal parts, within its node on its link, beyond on the network."""
        per_node = max(1, min(size, self.devices_per_node // stride))
        nodes = -(-size // per_node)
        inside, outside = self.hardware.intra_node, self.hardware.inter_node
        seconds = (per_node - 1) * (bytes_per_rank / size / inside.bytes_per_second + inside.latency_seconds)
        if nodes > 1:
            seconds += bytes_per_rank * (nodes - 1) / nodes / outside.bytes_per_second
            seconds += (nodes - 1) * outside.latency_seconds
        return seconds

    def send(self, sent_bytes: float, stride: int) -> float:
        """One message to the rank `stride` further."""
        link = self.hardware.intra_node if stride < self.devices_per_node else self.hardware.inter_node
        return sent_bytes / link.bytes_per_second + link.latency_seconds

    def _ring_link(self, size: int, stride: int) -> Link:
        """The slowest link of a ring. Groups that cross nodes at once share every port of a node between them."""
        inside, outside = self.hardware.intra_node, self.hardware.inter_node
        if size * stride <= self.devices_per_node:
            return inside
        sharing = min(self.devices_per_node, stride)
        bandwidth = outside.bytes_per_second * self.devices_per_node / sharing
        return Link(outside.latency_seconds, min(bandwidth, inside.bytes_per_second))


def estimate_time(job: JobSpec, layout: Layout, micro_batch: int, hardware: Hardware) -> TimeEstimate:
    """Seconds of one step, forward to optimizer, on the slowest stage of the pipeline."""
    network = Network(hardware, job.cluster.devices_per_node)
    micro_batches = job.train.global_batch // (layout.dp * micro_batch)
    found = stages(job.model, layout)
    layers = found[0].dense_layers + found[0].moe_layers
    tensor_dense, tensor_moe = _tensor_seconds(job, layout, micro_batch, network)
    all_to_all = _all_to_all_seconds(job, layout, micro_batch, network)
    activation = element_bytes(job) * micro_batch * job.train.sequence_length * job.model.hidden / layout.cp / layout.tp
    # Each micro-batch is received once forward and its gradient once backward, sent the same.
    between = 2 * network.send(activation, layout.tp * layout.cp * layout.dp) if layout.pp > 1 else 0.0
    between *= layout.vpp  # a micro-batch passes each stage once a virtual stage
    context_layer = _context_seconds(job, layout, micro_batch, network)
    # Recomputing a layer is its forward once more: of matrix products a third of what there was, of collectives a half.
    again = job.layout.recompute == "full"
    compute_factor, collective_factor = (4 / 3, 1.5) if again else (1.0, 1.0)
    launch = layers * hardware.layer_launch_seconds

    def of_stage(stage: Stage) -> TimeEstimate:
        compute = compute_factor * _compute_seconds(job, layout, micro_batch, stage, hardware)
        tensor = collective_factor * (stage.dense_layers * tensor_dense + stage.moe_layers * tensor_moe)
        expert = collective_factor * stage.moe_layers * all_to_all
        context = collective_factor * layers * context_layer
        return TimeEstimate(
            compute=micro_batches * compute,
            launch=micro_batches * launch,
            tensor=micro_batches * tensor,
            expert=micro_batches * expert,
            context=micro_batches * context,
            pipeline=micro_batches * between,
            bubble=(layout.pp - 1) / layout.vpp * (compute + launch + tensor + expert + context + between),
            data=_data_seconds(job, layout, stage, network),
            optimizer=_optimizer_seconds(job, layout, stage, hardware),
        )

    # Stages of equal shape take equal time: only one of each need be looked at.
    return max(map(of_stage, dict.fromkeys(found)), key=lambda estimate: estimate.total)


def _compute_seconds(job: JobSpec, layout: Layout, micro_batch: int, stage: Stage, hardware: Hardware) -> float:
    """One micro-batch, forward and backward, on one rank."""
    model, element = job.model, element_bytes(job)
    length = job.train.sequence_length
    layers = stage.dense_layers + stage.moe_layers
    load = EXPERT_LOAD if layout.ep > 1 else 1.0
    # A rank's share of tokens is 1 / (tp cp), of dense work likewise; of routed work too, but for uneven load.
    per_token = (
        layers * model.attention_flops(length)
        + stage.dense_layers * model.ffn_flops
        + stage.moe_layers * (model.router_and_shared_flops + load * model.routed_flops)
        + stage.is_last * model.head_flops
    )
    flops = per_token * micro_batch * length / (layout.tp * layout.cp)
    dense_bytes, moe_bytes = activation_bytes(job, layout, micro_batch)
    # What is kept is written, read and met by a gradient of its size that is written and read.
    traffic = 4.0 * (stage.dense_layers * dense_bytes + stage.moe_layers * moe_bytes)
    # Each micro-batch's weight gradients are written, read and added to fp32 ones.
    traffic += (stage.dense_parameters + stage.expert_parameters) * (2 * element + 8)
    return flops / hardware.achieved_flops(job.train.precision) + traffic / hardware.memory_bytes_per_second


def _tensor_seconds(job: JobSpec, layout: Layout, micro_batch: int, network: Network) -> tuple[float, float]:
    """Tensor-parallel collectives of one dense and one MoE layer, a micro-batch, forward and backward.

    Sequence parallelism (Korthikanti et al. 2022): a block gathers its input and scatters its output forward; backward
    the same mirrored, and the input once more for the weight gradients: 3 gathers, 2 scatters of s b h. Experts
    gather the tokens routed to their expert tensor-parallel group instead, and need none again: 2 gathers, 2 scatters.
    """
    model, element = job.model, element_bytes(job)
    block = 0.0
    if layout.tp > 1:
        volume = element * micro_batch * job.train.sequence_length * model.hidden / layout.cp
        block = 5 * network.all_gather(volume, layout.tp, 1)
    experts = 0.0
    if model.is_moe and layout.etp > 1:
        volume = element * routed_tokens(job, layout, micro_batch) * model.hidden
        experts = 4 * network.all_gather(volume, layout.etp, 1)
    return 2 * block, block + experts + (block if model.shared_expert_ffn else 0.0)


def _all_to_all_seconds(job: JobSpec, layout: Layout, micro_batch: int, network: Network) -> float:
    """One MoE layer, a micro-batch: dispatch and combine, forward and backward, of the top_k copies of its tokens."""
    if layout.ep == 1:
        return 0.0
    copies = routed_tokens(job, layout, micro_batch) / layout.etp
    volume = element_bytes(job) * copies * job.model.hidden
    return 4 * network.all_to_all(volume, layout.ep, layout.etp)


def _context_seconds(job: JobSpec, layout: Layout, micro_batch: int, network: Network) -> float:
    """One layer's attention over the ranks that share a sequence, a micro-batch, forward and backward.

    Gathered or passed round, keys and values travel once forward and once more backward, and their gradients back.
    Ulysses sends queries, keys, values and the output all to all, and the gradients of the four.
    """
    if layout.cp == 1:
        return 0.0
    model = job.model
    tokens = micro_batch * job.train.sequence_length
    keys = 2 * model.kv_heads * model.head_dim / layout.tp
    if job.layout.context_attention == "ulysses":
        volume = element_bytes(job) * tokens / layout.cp * (keys + 2 * model.heads * model.head_dim / layout.tp)
        return 2 * network.all_to_all(volume, layout.cp, layout.tp)
    return 3 * network.all_gather(element_bytes(job) * tokens * keys, layout.cp, layout.tp)


def _data_seconds(job: JobSpec, layout: Layout, stage: Stage, network: Network) -> float:
    """Distributed optimizer: reduce-scatter of fp32 gradients, all-gather of weights, dense ones and experts' apart."""
    bytes_each = 4 + element_bytes(job)
    replicas = layout.dp * layout.cp
    dense = network.all_gather(stage.dense_parameters * bytes_each, replicas, layout.tp)
    # Replicas of a shard of experts stand a whole expert-parallel group apart.
    experts = network.all_gather(stage.expert_parameters * bytes_each, layout.edp, layout.etp * layout.ep)
    return dense + experts


def _optimizer_seconds(job: JobSpec, layout: Layout, stage: Stage, hardware: Hardware) -> float:
    """Adam, bound by memory: fp32 weight and moments read and written, fp32 gradient read, model's weight written."""
    shard = stage.dense_parameters / (layout.dp * layout.cp) + stage.expert_parameters / layout.edp
    return shard * (28 + element_bytes(job)) / hardware.memory_bytes_per_second
