"""What copies of experts have at their disposal at a layout: memory, and the link while attention computes."""

from __future__ import annotations

from jobs.spec import JobSpec
from parallel.estimates.copies import limits_of, wire_of
from parallel.estimates.hardware import Hardware, hardware
from parallel.estimates.layers import attention_parts
from parallel.estimates.network import Network
from parallel.estimates.operators import linear
from parallel.estimates.software import software
from parallel.estimates.workload import Workload
from parallel.fssdp import Limits, Means
from parallel.fssdp_dispatch import Topology
from parallel.layout import Layout


def means_of(job: JobSpec) -> Means:
    """Of a job whose degrees and micro-batch are given, on the devices that its cluster names.

    `layout.expert_copies` stands for both limits where it is given; then nothing is copied once the gate has spoken.
    """
    layout, copies = Layout.of(job.layout), job.layout.expert_copies
    topology = Topology(layout.ep, min(layout.ep, max(1, job.cluster.devices_per_node // layout.etp)))
    if copies is not None:
        return Means(topology, Limits(copies, 2 * copies))
    device = hardware(job.cluster.hardware, job.cluster.devices_per_node)
    workload = Workload.of(job, layout, job.layout.micro_batch or 1)
    limits = limits_of(workload, device, window_seconds(workload, device))
    return Means(topology, limits, token_seconds(workload, device), wire_of(workload, device))


def unshared(job: JobSpec) -> str | None:
    """Why no expert is ever copied by a job that asks for it, with the numbers; None where some can be."""
    layout = Layout.of(job.layout)
    if not job.model.is_moe or job.layout.expert_parallelism != "fssdp" or layout.ep == 1:
        return None
    means = means_of(job)
    if means.wire is None or min(means.limits.slots, means.limits.movable) > 0:
        return None
    each = means.wire.expert_bytes
    if means.limits.slots == 0:
        reason = f"copies of an expert of {each / 1e6:,.1f} MB for two layers are more than 4% of a device's memory"
    else:
        device = hardware(job.cluster.hardware, job.cluster.devices_per_node)
        window = window_seconds(Workload.of(job, layout, job.layout.micro_batch or 1), device)
        reason = (
            f"an expert of {each / 1e6:,.1f} MB takes {means.wire.seconds(1) * 1e3:,.2f} ms over the link, and "
            f"attention, which hides it, {window * 1e3:,.2f} ms"
        )
    return f"layout.expert_parallelism=fssdp: no expert is copied, and ranks wait as with ep: {reason}"


def window_seconds(workload: Workload, device: Hardware) -> float:
    """Forward of a layer's attention on one rank, behind which its experts' copies come."""
    network, ours = Network(device, workload.devices_per_node), software(workload.software)
    return sum(part.forward for part in attention_parts(workload, device, network, ours).values())


def token_seconds(workload: Workload, device: Hardware) -> float:
    """Forward and backward of one token in one expert, of many."""
    model, width = workload.model, workload.model.expert_ffn // workload.layout.etp
    rows = 4096
    both = linear(device, workload.precision, rows, 2 * width, model.hidden)
    both += linear(device, workload.precision, rows, model.hidden, width)
    return (both.forward + both.backward) / rows
