"""The small models and jobs that engines are tried with, on as many CPU ranks as a layout takes."""

from __future__ import annotations

from typing import Any

from jobs.architecture import ModelArchitecture
from jobs.spec import CheckpointSpec, ClusterSpec, DataSpec, JobSpec, LayoutSpec, PolicySpec, TrainSpec

# Weights large enough that no router's choice hangs on rounding: a near tie decided otherwise is another model.
_SHAPE: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48, "vocab": 64}
_SHAPE |= {"init_std": 0.1}
_MOE: dict[str, Any] = {"experts": 4, "top_k": 2, "expert_ffn": 24, "aux_loss": 0.05, "z_loss": 0.01}
_KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixtral": _MOE,
    # What Qwen's mixtures add; a first stage may have no experts, and the last holds a copy of the embedding.
    "qwen": {
        **_MOE,
        "tied_embeddings": True,
        "attention_bias": True,
        "qk_norm": True,
        "shared_expert_ffn": 40,
        "shared_expert_gate": True,
        "first_dense_layers": 1,
        "router_normalize_top_k": False,
    },
    "deepseek": {**_MOE, "router_score": "sigmoid", "router_bias": True},
}


def small_model(kind: str, **changes: Any) -> ModelArchitecture:
    """`dense`, `mixtral`, `qwen` or `deepseek`, of two layers unless `changes` say otherwise."""
    return ModelArchitecture(**{"name": kind, **_SHAPE, **_KINDS[kind], **changes})


def small_job(
    model: ModelArchitecture,
    layout: dict[str, Any],
    *,
    engine: str = "megatron",
    packing: bool = False,
    checkpoint_interval: int = 1,
    **train: Any,
) -> JobSpec:
    """A job of micro-batches of two sequences and 8 sequences a step, in fp32, with clipping and decay."""
    given = {
        "sequence_length": 16,
        "global_batch": 8,
        "precision": "fp32",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "clip_grad_norm": 0.5,
    }
    return JobSpec(
        name=model.name,
        engine=engine,
        model=model,
        data=DataSpec(files=("unused",), packing=packing),
        cluster=ClusterSpec(name="test", device="cpu", hardware="laptop_cpu", devices_per_node=8),
        layout=LayoutSpec(**{"micro_batch": 2, **layout}),
        train=TrainSpec(**{**given, **train}),
        checkpoint=CheckpointSpec(interval=checkpoint_interval),
        policy=PolicySpec(),
    )
