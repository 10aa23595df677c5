"""The shape of a model and what follows from it: parameters and FLOPs. Pure arithmetic."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Spec(BaseModel):
    """Base of everything a user writes: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelArchitecture(Spec):
    """A decoder-only transformer: RMSNorm, RoPE, GQA or multi-latent attention, SwiGLU, dense or MoE.

    `experts == 0` is a dense model; the expert fields are then unused. Sizes are in elements.
    """

    name: str
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0, description="query groups; equal to heads without GQA")
    head_dim: int = Field(gt=0, description="width of a head; multi-latent attention: without the rotary part")
    ffn: int = Field(ge=0, description="width of the dense feed-forward layers (SwiGLU); 0 if every layer is MoE")
    gated: bool = Field(True, description="feed-forward by SwiGLU; false: two matrices and a GELU, planned only")
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
    router_bias_rate: float = Field(1e-3, gt=0, description="what a step adds to, or takes from, each expert's bias")
    router_scale: float = Field(1.0, gt=0, description="factor on the chosen experts' weights")
    aux_loss: float = Field(0.0, ge=0, description="coefficient of the load-balancing loss")
    z_loss: float = Field(0.0, ge=0, description="coefficient of the router z-loss")
    capacity_factor: float = Field(
        0.0, ge=0, description="an expert takes at most this times the mean load of the tokens a rank sees; 0: all"
    )
    drop_order: Literal["probs", "position"] = Field(
        "probs", description="who keeps an expert's places: the largest weights, or the earliest tokens"
    )

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
        if self.shared_expert_gate and not self.shared_expert_ffn:
            raise ValueError("shared_expert_gate=True needs shared_expert_ffn above 0")
        if self.is_multi_latent and not (self.rope_head_dim and self.value_head_dim):
            raise ValueError(f"kv_lora_rank={self.kv_lora_rank} needs rope_head_dim and value_head_dim above 0")
        return self

    def __hash__(self) -> int:
        """Of a few fields, which tell models apart well enough: estimates look a model up many thousand times."""
        return hash((self.layers, self.hidden, self.heads, self.ffn, self.experts))

    @property
    def is_moe(self) -> bool:
        return self.experts > 0

    @property
    def dense_layers(self) -> int:
        return min(self.first_dense_layers, self.layers) if self.is_moe else self.layers

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def is_multi_latent(self) -> bool:
        return self.kv_lora_rank > 0

    # Parameters, in elements. Only what the optimizer trains: the balancing bias of `router_bias` is set by rule and
    # is no parameter (DeepSeek-V3 publishes 671,026,419,200 with its 58 x 256 biases, 671,026,404,352 without).

    @property
    def embedding_parameters(self) -> int:
        """The token table."""
        return self.vocab * self.hidden

    @property
    def head_parameters(self) -> int:
        """The output projection; 0 where it is the token table."""
        return 0 if self.tied_embeddings else self.vocab * self.hidden

    @property
    def attention_split_parameters(self) -> int:
        """Attention weights of one layer that tensor parallelism divides by heads."""
        if not self.is_multi_latent:
            projected = (self.heads + 2 * self.kv_heads) * self.head_dim
            return self.hidden * (projected + self.heads * self.head_dim) + self.attention_bias * projected
        query = (self.q_lora_rank or self.hidden) * self.heads * (self.head_dim + self.rope_head_dim)
        key_value = self.kv_lora_rank * self.heads * (self.head_dim + self.value_head_dim)
        return query + key_value + self.heads * self.value_head_dim * self.hidden

    @property
    def attention_replicated_parameters(self) -> int:
        """Attention weights of one layer that every tensor-parallel rank holds whole: head norms, latents."""
        if not self.is_multi_latent:
            return 2 * self.head_dim * self.qk_norm
        query = self.q_lora_rank * (self.hidden + 1)
        return query + self.hidden * (self.kv_lora_rank + self.rope_head_dim) + self.kv_lora_rank

    @property
    def attention_parameters(self) -> int:
        """Attention of one layer, its biases and inner norms included."""
        return self.attention_split_parameters + self.attention_replicated_parameters

    @property
    def norm_parameters(self) -> int:
        """The two norms of one layer."""
        return 2 * self.hidden

    @property
    def ffn_parameters(self) -> int:
        """The feed-forward block of one dense layer (SwiGLU: gate, up, down)."""
        return self._matrices * self.hidden * self.ffn

    @property
    def _matrices(self) -> int:
        """Of a feed-forward block."""
        return 3 if self.gated else 2

    @property
    def router_parameters(self) -> int:
        """The router of one MoE layer."""
        return self.hidden * self.experts

    @property
    def expert_parameters(self) -> int:
        """One routed expert."""
        return self._matrices * self.hidden * self.expert_ffn

    @property
    def shared_expert_parameters(self) -> int:
        """The shared experts of one MoE layer, with their gate."""
        return self._matrices * self.hidden * self.shared_expert_ffn + self.hidden * self.shared_expert_gate

    @property
    def parameters(self) -> int:
        """All of them."""
        return self._parameters(self.experts)

    @property
    def active_parameters(self) -> int:
        """Those that one token visits: `top_k` of the routed experts, and all the rest (both vocabulary tables too)."""
        return self._parameters(self.top_k)

    def _parameters(self, experts: int) -> int:
        every_layer = self.attention_parameters + self.norm_parameters
        moe_layer = self.router_parameters + self.shared_expert_parameters + experts * self.expert_parameters
        final_norm = self.hidden
        return (
            self.embedding_parameters
            + self.layers * every_layer
            + self.dense_layers * self.ffn_parameters
            + self.moe_layers * moe_layer
            + final_norm
            + self.head_parameters
        )

    # Model FLOPs of one token, forward and backward: 6 a weight that multiplies it (2 forward, 4 backward), and the
    # attention products over the half of the sequence that a causal mask leaves (PaLM, Chowdhery et al. 2022,
    # appendix B, which counts the whole). Norms, activations and the embedding look-up are not counted.

    def attention_flops(self, sequence_length: int) -> int:
        """One layer's attention: projections, and scores and their product with the values, causal, counted half."""
        if self.is_multi_latent:
            latent = self.q_lora_rank * self.hidden + self.hidden * (self.kv_lora_rank + self.rope_head_dim)
            weights = self.attention_split_parameters + latent
            products = self.heads * (self.head_dim + self.rope_head_dim + self.value_head_dim)
        else:
            weights = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
            products = 2 * self.heads * self.head_dim
        return 6 * weights + 3 * sequence_length * products

    @property
    def ffn_flops(self) -> int:
        """One dense layer's feed-forward block."""
        return 6 * self.ffn_parameters

    @property
    def router_and_shared_flops(self) -> int:
        """One MoE layer's router and shared experts."""
        return 6 * (self.router_parameters + self.shared_expert_parameters)

    @property
    def routed_flops(self) -> int:
        """One MoE layer's chosen experts."""
        return 6 * self.top_k * self.expert_parameters

    @property
    def head_flops(self) -> int:
        """The output projection, tied or not."""
        return 6 * self.vocab * self.hidden

    def flops_per_token(self, sequence_length: int) -> int:
        """The whole model."""
        return (
            self.layers * self.attention_flops(sequence_length)
            + self.dense_layers * self.ffn_flops
            + self.moe_layers * (self.router_and_shared_flops + self.routed_flops)
            + self.head_flops
        )
