"""The shape of a model and what follows from it: parameters, FLOPs, activation bytes. Pure arithmetic."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Spec(BaseModel):
    """Base of everything a user writes: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelArchitecture(Spec):
    """A decoder-only transformer: RMSNorm, RoPE, GQA or multi-latent attention, SwiGLU, dense or MoE.

    `experts == 0` is a dense model; the expert fields are then unused. Sizes are in elements.
    """

    name: str
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0, description="query groups; equal to heads without GQA")
    head_dim: int = Field(gt=0)
    ffn: int = Field(ge=0, description="width of the dense feed-forward layers (SwiGLU); 0 if every layer is MoE")
    vocab: int = Field(gt=1)
    tied_embeddings: bool = False
    attention_bias: bool = Field(False, description="bias on the query, key and value projections (Qwen2)")
    qk_norm: bool = Field(False, description="RMSNorm over each head's query and key (Qwen3)")
    rope_theta: float = Field(10_000.0, gt=0)
    norm_epsilon: float = Field(1e-5, gt=0)
    init_std: float = Field(0.02, gt=0)

    experts: int = Field(0, ge=0)
    top_k: int = Field(0, ge=0)
    expert_ffn: int = Field(0, ge=0)
    shared_expert_ffn: int = Field(0, ge=0, description="total width of the experts that every token visits")
    shared_expert_gate: bool = Field(False, description="a sigmoid gate on the shared experts (Qwen2-MoE)")
    first_dense_layers: int = Field(0, ge=0, description="leading layers that stay dense (DeepSeek-V3: 3)")
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    router_normalize_top_k: bool = Field(True, description="the chosen experts' weights sum to one")
    router_bias: bool = Field(False, description="auxiliary-loss-free balancing by a per-expert bias")
    router_scale: float = Field(1.0, gt=0, description="factor on the chosen experts' weights")
    aux_loss: float = Field(0.0, ge=0, description="coefficient of the load-balancing loss")
    z_loss: float = Field(0.0, ge=0, description="coefficient of the router z-loss")

    kv_lora_rank: int = Field(0, ge=0, description="multi-latent attention when above 0 (DeepSeek-V2/V3)")
    q_lora_rank: int = Field(0, ge=0)
    rope_head_dim: int = Field(0, ge=0, description="multi-latent attention: rotary part of a query/key head")
    value_head_dim: int = Field(0, ge=0, description="multi-latent attention: width of a value head")

    @model_validator(mode="after")
    def _consistent(self) -> ModelArchitecture:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.experts:
            if not 1 <= self.top_k <= self.experts:
                raise ValueError(f"top_k={self.top_k} is not within 1..experts={self.experts}")
            if self.expert_ffn == 0:
                raise ValueError(f"experts={self.experts} need expert_ffn above 0")
        if self.dense_layers and self.ffn == 0:
            raise ValueError(f"{self.dense_layers} dense layers need ffn above 0")
        return self

    @property
    def is_moe(self) -> bool:
        return self.experts > 0

    @property
    def dense_layers(self) -> int:
        return min(self.first_dense_layers, self.layers) if self.is_moe else self.layers

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers
