"""What DeepSpeed is told of a job."""

from __future__ import annotations

from typing import Any

import torch

from jobs.spec import JobSpec
from models.stages import Stage
from parallel.layout import Layout

_BUCKET = 50_000_000
"""Elements that are reduced or gathered at once, at most."""


def settings(job: JobSpec, layout: Layout, device: torch.device, decoder: Stage) -> dict[str, Any]:
    """DeepSpeed's configuration for a rank that has `decoder`."""
    train, options = job.train, job.layout.options

    def offload(place: str) -> dict[str, Any]:
        folder = job.layout.nvme_folder if place == "nvme" else None
        return {"device": place, "nvme_path": folder, "pin_memory": device.type == "cuda"}

    zero: dict[str, Any] = {
        "stage": options["zero_stage"],
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
        # Vectors are kept whole by every rank, matrices are not.
        "stage3_param_persistence_threshold": 2 * job.model.hidden,
        "offload_optimizer": offload(options["offload_optimizer"]),
        "offload_param": offload(options["offload_parameters"]) | _buffers(decoder, layout),
        # What is fetched ahead is not counted among the buffers, and finds none left.
        **({"stage3_prefetch_bucket_size": 0} if options["offload_parameters"] == "nvme" else {}),
    }
    return {
        # Micro-batches are counted in train_step, which says which is the last: DeepSpeed would divide by their
        # number, twice even without ZeRO where told not to.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_grad_norm if options["zero_stage"] else 0.0,
        "zero_optimization": zero,
        # torch's AdamW: DeepSpeed's own are compiled when they are first used.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def _buffers(decoder: Stage, layout: Layout) -> dict[str, int]:
    """Memory through which parameters come from NVMe: twice what the layer with the most has.

    DeepSpeed's own five are too few for an MoE layer, whose experts it reads at once, and have 1e8 elements each.
    """
    layers = [list(layer.parameters()) for layer in decoder.layers.values()]
    largest = max(parameter.numel() for parameter in decoder.parameters())
    return {"max_in_cpu": 0, "buffer_count": 2 * max(map(len, layers)), "buffer_size": -(-largest // layout.dp)}
