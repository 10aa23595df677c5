"""A rank's swapping of activations, of both engines."""

from __future__ import annotations

import torch

from jobs.spec import JobSpec
from orchestrator.worker.host_memory import available_bytes
from parallel.estimates.swapping import HOST_SHARE
from parallel.offload import Swap


def swapping(job: JobSpec, device: torch.device) -> Swap | None:
    """None where activations stay."""
    fraction = job.layout.offload_activations
    if fraction is None:
        return None
    assert fraction != "auto", "a plan has made it a number"
    return Swap(device, fraction, HOST_SHARE * available_bytes() / job.cluster.devices_per_node)
