"""A decoder-only transformer for Megatron-Core without TransformerEngine: its configuration and its parts.

Megatron takes a model as a tree of module specs, and asks a provider for the modules. The one given here names
Megatron's own parallel linears, the attention of `models.megatron_attention`, and the experts of
`models.megatron_experts`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from jobs.architecture import ModelArchitecture
from jobs.spec import JobSpec, LayoutSpec
from kernels.cross_entropy import linear_cross_entropy
from kernels.rms_norm import add_rms_norm, rms_norm
from models.megatron_attention import GATHER, RING, CausalAttention, rotate_as_called
from models.uncompiled import uncompiled
from parallel.layout import Layout
from parallel.offload import WHOLE, Swap

# Said by Megatron and, about Megatron, by torch, of things that are meant to be as they are.
for _message, _category in (
    (r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1", UserWarning),
    (r"When using sequence parallelism it is recommended to set .* CUDA_DEVICE_MAX_CONNECTIONS", UserWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
    (r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated", FutureWarning),
    (r"`load_state_dict` is deprecated and will be removed", FutureWarning),
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
    (r"If you are using transformer_engine as the transformer implementation, the core_attn", UserWarning),
):
    warnings.filterwarnings("ignore", _message, _category)

with uncompiled():
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
        get_transformer_layer_offset,
    )

    from models import megatron_fusions
    from models.megatron_dispatch import dispatch_in_order
    from models.megatron_experts import GroupedExperts
    from models.megatron_moe import Router
    from models.megatron_swap import swapped_forward


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) over the last dimension.

    Under sequence parallelism each TP rank sees a part of the sequence, so its weight's gradient is a part of a sum;
    `sequence_parallel` on the weight asks Megatron to add the parts. torch's own module cannot carry the mark.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.epsilon = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.weight, self.epsilon)

    def of_sum(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, and the norm of it."""
        return add_rms_norm(hidden, residual, self.weight, self.epsilon)


class Layer(TransformerLayer):
    """Megatron's, where what attention gives is added to the residual stream and normed in one pass."""

    swap: Swap | None = None
    """What keeps activations for backward, where autograd does not."""

    send_first: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Sees the hidden states before all else, and gives them back."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any) -> Any:
        whole = super().forward

        def compute(hidden: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = whole(self._sent_first(hidden), attention_mask, **others)[0]
            return out

        if self.swap is None or not torch.is_grad_enabled():
            return compute(hidden_states), None
        if WHOLE in self.swap.again:
            return self.swap.recomputed(compute, hidden_states, self), None
        hidden = self._sent_first(hidden_states)
        return swapped_forward(self, self.swap, hidden, attention_mask, others["rotary_pos_emb"]), None

    def _sent_first(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.send_first is None else self.send_first(hidden)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._normed: torch.Tensor | None = None
        if not self.recompute_pre_mlp_layernorm:
            self.self_attn_bda = lambda training, fused: self._add

    def _add(
        self, attended: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        hidden, bias = attended
        assert bias is None
        assert dropout == 0
        total, self._normed = self.pre_mlp_layernorm.of_sum(hidden, residual)
        return total

    def _forward_pre_mlp_layernorm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._normed is None:
            return super()._forward_pre_mlp_layernorm(hidden_states)
        normed, self._normed = self._normed, None
        return normed


def transformer_config(job: JobSpec, layout: Layout) -> TransformerConfig:
    """Megatron's configuration of `job.model` at `layout`: SwiGLU, RMSNorm, no dropout."""
    megatron_fusions.install()
    model, train = job.model, job.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    config = TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn or model.expert_ffn,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.attention_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights are set by name (models.weights); Megatron's own pass still has to mark the tensor-parallel ones.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bf16",
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=bool(layout.sp),
        context_parallel_size=layout.cp,
        cp_comm_type=RING if job.layout.context_attention == "ring" else GATHER,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        pipeline_model_parallel_layout=_stages(layout),
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        # models.megatron_fusions has these two; the others want Apex, TransformerEngine or torch.compile.
        bias_activation_fusion=True,
        apply_rope_fusion=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
        **_recompute_options(job.layout),
        **(_moe_options(model, job.layout) if model.is_moe else {}),
    )
    # Not given above, since Megatron would refuse it with softmax, which its own router has no bias for.
    config.moe_router_enable_expert_bias = model.is_moe and model.router_bias
    return config


def _stages(layout: Layout) -> list[list[str]] | None:
    """What each pipeline stage has, where their layers are not equally many."""
    if layout.stage_layers is None:
        return None
    stages = [["decoder"] * layers for layers in layout.stage_layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _recompute_options(layout: LayoutSpec) -> dict[str, Any]:
    if layout.offload_activations is not None:
        return {}  # layers do it themselves
    if layout.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if layout.recompute == "selective":
        modules = list(layout.options["recompute_modules"])
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {}


def _moe_options(model: ModelArchitecture, layout: LayoutSpec) -> dict[str, Any]:
    return {
        "num_moe_experts": model.experts,
        "moe_ffn_hidden_size": model.expert_ffn,
        "moe_router_topk": model.top_k,
        "moe_layer_freq": [0] * model.dense_layers + [1] * model.moe_layers if model.dense_layers else 1,
        "moe_shared_expert_intermediate_size": model.shared_expert_ffn or None,
        "moe_shared_expert_gate": model.shared_expert_gate,
        "moe_token_dispatcher_type": layout.dispatcher,
        "moe_expert_capacity_factor": model.capacity_factor or None,  # for dispatchers: they cannot count on top_k
        # How scores become weights is said by models.megatron_moe.Router alone; without this top_k=1 would be refused.
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_router_bias_update_rate": model.router_bias_rate,
        # Balanced within each sequence, so that the loss does not depend on how a batch is cut (DeepSeek-V2, 2024).
        "moe_router_load_balancing_type": "seq_aux_loss" if model.aux_loss else "none",
        "moe_aux_loss_coeff": model.aux_loss,
        "moe_z_loss_coeff": model.z_loss or None,
    }


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


class Provider(LocalSpecProvider):
    """Names the modules that Megatron's layers are made of, in place of TransformerEngine's."""

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return CausalAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules]:
        return GroupedExperts, MLPSubmodules()


def layer_specs(
    model: ModelArchitecture, config: TransformerConfig, virtual_stage: int | None, experts: ModuleSpec | None
) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage, or of one of its virtual stages, and the final norm."""
    provider = Provider()
    start = get_transformer_layer_offset(config, virtual_stage)
    stage = range(start, start + get_num_layers_to_build(config, virtual_stage))
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(model, provider, experts, is_moe=index >= model.dense_layers) for index in stage],
        layer_norm=provider.layer_norm(),
    )


def _layer_spec(
    model: ModelArchitecture, provider: Provider, experts: ModuleSpec | None, *, is_moe: bool
) -> ModuleSpec:
    mlp = get_mlp_module_spec_for_backend(provider, num_experts=model.experts if is_moe else None)
    if is_moe:
        mlp.submodules.router = partial(Router, model)
        mlp.submodules.experts = experts or mlp.submodules.experts
    head_norm = provider.layer_norm(for_qk=True) if model.qk_norm else None
    attention = SelfAttentionSubmodules(
        linear_qkv=provider.column_parallel_linear(),
        core_attention=provider.core_attention(),
        linear_proj=provider.row_parallel_linear(),
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=provider.layer_norm(),
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=provider.layer_norm(),
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class Model(GPTModel):
    """Megatron's, which ends in the sum of what labels lose; where one rank has the whole head, it makes no logits."""

    def _postprocess(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        """Hidden states [sequence, batch, hidden], labels and what each counts [batch, sequence] -> their loss, []."""
        if not self.post_process:
            return hidden_states
        if self.output_layer.tp_group.size() > 1:
            losses = super()._postprocess(hidden_states=hidden_states, labels=labels, loss_mask=None, **others)
            return (losses * loss_mask).sum()
        head = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return linear_cross_entropy(
            hidden_states.flatten(0, 1),
            self.output_layer.weight if head is None else head,
            labels.T.flatten(),
            loss_mask.T.flatten(),
        )


def build_model(
    job: JobSpec,
    config: TransformerConfig,
    device: torch.device,
    virtual_stage: int | None = None,
    experts: ModuleSpec | None = None,
) -> Model:
    """This rank's part of the model, or one virtual stage of it, its weights yet to be set.

    experts: those of a mixture, where they are not `models.megatron_experts`'.

    Wants megatron.core.parallel_state initialised. Called with tokens, positions, documents, labels and loss_mask, see
    `models.megatron_attention`; gives the sum [] of the labels' cross-entropies, each times its mask.
    """
    at = {"ignore_virtual": False, "vp_stage": virtual_stage}
    model = Model(
        config=config,
        transformer_layer_spec=layer_specs(job.model, config, virtual_stage, experts),
        vocab_size=job.model.vocab,
        max_sequence_length=job.train.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(**at),
        post_process=parallel_state.is_pipeline_last_stage(**at),
        share_embeddings_and_output_weights=job.model.tied_embeddings,
        position_embedding_type="rope",
        vp_stage=virtual_stage,
    ).to(device)
    rotate_as_called(model, job.model.head_dim, job.model.rope_theta)
    dispatch_in_order(model)
    for name, parameter in model.named_parameters():
        # Megatron clears `allreduce` only if ep > 1. Where experts are replicated over more ranks than dense weights
        # (etp * ep < tp) their gradients would be summed over too few; this sends them to the expert's own group, and
        # gives every layout the same two optimizers, without which a checkpoint cannot change ep.
        if ".experts." in name:
            parameter.allreduce = False
    return model
