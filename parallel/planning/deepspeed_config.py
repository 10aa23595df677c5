"""A resolved job as a DeepSpeed configuration file."""

from __future__ import annotations

from typing import Any

from jobs.spec import JobSpec, LayoutSpec
from parallel.planning.options import without_a_name

_OFFLOADED = {"offload_optimizer": "offload_optimizer", "offload_parameters": "offload_param"}
"""Fields of LayoutSpec, and DeepSpeed's names."""


def deepspeed_config(job: JobSpec) -> dict[str, Any]:
    """Batch, precision, sharding, offload and optimizer of a job whose degrees are all given.

    DeepSpeed has no key for what `outside_the_config` names. The learning rate's decay is a cosine after a warm-up.
    """
    train, layout = job.train, job.layout
    degrees = layout.degrees
    micro_batch = layout.micro_batch or 1
    config: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": train.global_batch // (degrees["dp"] * micro_batch),
        "gradient_clipping": train.clip_grad_norm,
        "bf16": {"enabled": train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": layout.options["zero_stage"], **_offload(layout)},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "betas": [train.adam_beta1, train.adam_beta2],
                "eps": train.adam_epsilon,
                "weight_decay": train.weight_decay,
            },
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": train.steps,
                "warmup_num_steps": train.warmup_steps,
                "warmup_min_ratio": 0.0,
                "warmup_type": "linear",
                "cos_min_ratio": train.min_learning_rate / train.learning_rate,
            },
        },
    }
    if degrees["cp"] > 1:
        config["sequence_parallel_size"] = degrees["cp"]
    return config


def outside_the_config(job: JobSpec) -> list[str]:
    """What of the layout a script says to DeepSpeed itself: `pp=2: PipelineModule(num_stages=2)`."""
    degrees = job.layout.degrees
    places = {
        "tp": "the mpu given to deepspeed.initialize, tensor parallel world size {}",
        "pp": "PipelineModule(num_stages={})",
        "ep": "deepspeed.moe.layer.MoE(ep_size={})",
    }
    said = [f"{axis}={degrees[axis]}: {place.format(degrees[axis])}" for axis, place in places.items()]
    found = [text for axis, text in zip(places, said, strict=True) if degrees[axis] > 1]
    if job.layout.stage_layers is not None:
        found.append(f"stage_layers: a PipelineModule whose stages have {list(job.layout.stage_layers)} layers")
    if job.layout.recompute == "full":
        found.append("recompute=full: deepspeed.checkpointing.checkpoint around each layer")
    return found + without_a_name(job.layout)


def _offload(layout: LayoutSpec) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, name in _OFFLOADED.items():
        place = layout.options[field]
        if place != "none":
            found[name] = {"device": place, "pin_memory": True}
        if place == "nvme":
            found[name]["nvme_path"] = layout.nvme_folder
    return found
