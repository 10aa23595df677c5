"""The models that layouts are held against the oracle with: what each shipped family adds, in some 60,000 weights."""

from __future__ import annotations

from typing import Any

from jobs.architecture import ModelArchitecture
from jobs.spec import CheckpointSpec, ClusterSpec, DataSpec, JobSpec, LayoutSpec, PolicySpec, TrainSpec

SEQUENCE, GLOBAL_BATCH, STEPS = 16, 8, 20

# Weights large enough that attention and routers have opinions.
_SHAPE: dict[str, Any] = {
    "init_std": 0.1,
    "layers": 4,
    "hidden": 32,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 4,
    "ffn": 48,
    "vocab": 64,
}
_MOE: dict[str, Any] = {"experts": 8, "top_k": 2, "expert_ffn": 16, "aux_loss": 0.05}
VARIANTS = {
    model.name: model
    for model in (
        ModelArchitecture(name="llama", tied_embeddings=True, **_SHAPE | {"layers": 8}),
        ModelArchitecture(name="mixtral", z_loss=0.01, **_SHAPE, **_MOE),
        ModelArchitecture(
            name="qwen2moe",
            attention_bias=True,
            shared_expert_ffn=32,
            shared_expert_gate=True,
            router_normalize_top_k=False,
            **_SHAPE,
            **_MOE,
        ),
        ModelArchitecture(name="qwen3moe", qk_norm=True, tied_embeddings=True, **_SHAPE, **_MOE),
        ModelArchitecture(
            name="deepseek",
            shared_expert_ffn=16,
            first_dense_layers=1,
            router_score="sigmoid",
            router_bias=True,
            router_scale=2.5,
            **_SHAPE | {"kv_heads": 8},
            **_MOE,
        ),
    )
}

TRAIN = TrainSpec(
    steps=STEPS,
    sequence_length=SEQUENCE,
    global_batch=GLOBAL_BATCH,
    precision="fp32",
    # Moves weights by a third of what they began with, and no step by so much that rounding grows into chaos.
    learning_rate=3e-3,
    min_learning_rate=3e-4,
    warmup_steps=3,
    weight_decay=0.1,
    clip_grad_norm=0.5,
    adam_epsilon=1e-6,  # above the rounding of gradients, whose sign an update would otherwise be
    seed=1,
)


def job(model: ModelArchitecture, engine: str, layout: LayoutSpec, *, packing: bool) -> JobSpec:
    return JobSpec(
        name="exactness",
        engine=engine,
        model=model,
        data=DataSpec(files=("unused",), packing=packing),
        cluster=ClusterSpec(name="laptop", device="cpu", hardware="laptop_cpu", devices_per_node=8),
        layout=layout,
        train=TRAIN,
        checkpoint=CheckpointSpec(interval=STEPS),
        policy=PolicySpec(),
    )
