"""A tiny model of each Hugging Face family, and weights that tell a wrong name, a wrong order or a lost norm."""

from __future__ import annotations

import torch
from torch import Tensor

from jobs.architecture import ModelArchitecture
from jobs.tensors import tensors

_SHAPE = {
    "layers": 2,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "ffn": 48,
    "vocab": 64,
    "rope_theta": 500.0,
}
_MOE = _SHAPE | {"experts": 8, "top_k": 3, "expert_ffn": 24}

FAMILIES = {
    "llama": ModelArchitecture(name="llama", **_SHAPE, tied_embeddings=True),
    "qwen2": ModelArchitecture(name="qwen2", **(_SHAPE | {"head_dim": 8}), attention_bias=True),
    "qwen3": ModelArchitecture(name="qwen3", **_SHAPE, qk_norm=True, norm_epsilon=1e-6),
    "mixtral": ModelArchitecture(name="mixtral", **(_MOE | {"ffn": 0})),
    "qwen2_moe": ModelArchitecture(
        name="qwen2_moe",
        **(_MOE | {"head_dim": 8}),
        attention_bias=True,
        shared_expert_ffn=40,
        shared_expert_gate=True,
        router_normalize_top_k=False,
        first_dense_layers=1,
    ),
    "qwen3_moe": ModelArchitecture(name="qwen3_moe", **_MOE, qk_norm=True, tied_embeddings=True),
}


def random_weights(model: ModelArchitecture, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Tensor]:
    """Each of the model's tensors, no two alike; norms around 1."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (0.2 * torch.randn(shape, generator=draw) + ("norm" in name)).to(dtype)
        for name, shape in tensors(model).items()
    }
