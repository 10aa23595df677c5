"""Two MoE layers with embedding and head, forward and backward: as this project trains them, and as others would."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from jobs.compose import compose
from jobs.spec import JobSpec
from kernels.cross_entropy import linear_cross_entropy
from models.megatron_specs import build_model, transformer_config
from models.reference import Context, MoE, positions_of
from models.stages import Stage
from orchestrator.worker.benches.measure import side_by_side
from orchestrator.worker.determinism import enforced
from orchestrator.worker.engines.cuda_stand_in import repair_megatron
from parallel.layout import Layout

# isort: split
# After models.megatron_specs, which decides how Megatron is imported.
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

Step = Callable[[], Any]

SHAPES: dict[str, tuple[str, ...]] = {
    "mixtral_8x7b": ("model=mixtral_8x7b",),
    "qwen2_57b_a14b": ("model=qwen2_57b_a14b",),
    # Its attention is of many latents, which no engine here runs: as many heads as its hidden size has, none shared.
    "deepseek_v3 at ep8": (
        *("model=mixtral_8x7b", "model.hidden=7168", "model.heads=56", "model.kv_heads=56", "model.expert_ffn=2048"),
        *("model.experts=32", "model.top_k=8", "model.shared_expert_ffn=2048", "model.router_score=sigmoid"),
    ),
}

PEERS = ("fivefold", "deepspeed moe", "megatron-core", "transformers", "transformers, compiled")
OURS = ("fivefold", "fivefold, deterministic", "fivefold, in a CUDA graph", "fivefold, deepspeed")
"""Side by side all of these would not fit a device."""

SMALLER = ("model.hidden=64", "model.heads=4", "model.kv_heads=2", "model.head_dim=16", "model.expert_ffn=96")
"""For a CPU."""


def job_of(shape: tuple[str, ...], sequence: int, device: torch.device) -> JobSpec:
    """Two layers and a vocabulary of 32,000, without a balancing loss, which others compute elsewhere or not at all."""
    same = ("model.layers=2", "model.vocab=32000", "model.aux_loss=0", f"train.sequence_length={sequence}")
    precision = "bf16" if device.type == "cuda" else "fp32"
    return compose("moe_1b", [*shape, *same, f"train.precision={precision}"])


def measure(
    shape: tuple[str, ...],
    device: torch.device,
    *,
    batch: int,
    sequence: int,
    rounds: int,
    names: Collection[str] = ("fivefold",),
) -> dict[str, dict[str, Any]]:
    """By way of these names: seconds and FLOP/s of the model, forward and backward. Wants torch.distributed."""
    job = job_of(shape, sequence, device)
    tokens = set_up(job, device, batch, sequence)
    flops = job.model.flops_per_token(sequence) * batch * sequence
    ways, failed = {}, {}
    for name in names:
        try:
            ways[name] = _WAYS[name](job, tokens)
            ways[name]()
        except (RuntimeError, ImportError, torch.OutOfMemoryError) as error:
            ways.pop(name, None)
            failed[name] = {"failed": str(error).splitlines()[0]}
    times = side_by_side(ways, device, rounds)
    return failed | {
        name: {
            "seconds": vars(timed),
            "flops_per_second": flops / timed.median,
            "tokens_per_second": batch * sequence / timed.median,
        }
        for name, timed in times.items()
    }


def repeated(
    shape: tuple[str, ...], device: torch.device, *, batch: int, sequence: int, times: int = 4
) -> dict[str, Any]:
    """Which of loss and gradients of the same weights and tokens are not equal to the last bit, deterministically."""
    job = job_of(shape, sequence, device)
    tokens = set_up(job, device, batch, sequence)
    model, loss_of = model_of(job, tokens)
    first: list[Tensor] = []
    differ = set()
    for _ in range(times):
        model.zero_grad(set_to_none=True)
        with enforced():
            loss = loss_of()
            loss.backward()
        found = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
        first = first or [tensor.clone() for tensor in found]
        names = ["loss", *(name for name, _ in model.named_parameters())]
        differ |= {name for name, a, b in zip(names, first, found, strict=True) if not torch.equal(a, b)}
    return {"times": times, "differ": sorted(differ)}


def set_up(job: JobSpec, device: torch.device, batch: int, sequence: int) -> Tensor:
    """Tokens, one more of each sequence than is trained."""
    repair_megatron()
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    return torch.randint(job.model.vocab, (batch, sequence + 1), device=device)


def forward_backward(model: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
    def step() -> None:
        loss_of().backward()
        model.zero_grad(set_to_none=True)  # now, not before the next: others need the memory

    return step


def drawn(parameters: Iterator[nn.Parameter]) -> None:
    """Alike for all: as models start, and routers choose unevenly."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)


def _ours(job: JobSpec, tokens: Tensor) -> Step:
    return forward_backward(*model_of(job, tokens))


def _deterministic(job: JobSpec, tokens: Tensor) -> Step:
    step = _ours(job, tokens)

    def in_one_order() -> None:
        with enforced():
            step()

    return in_one_order


def model_of(job: JobSpec, tokens: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = build_model(job, transformer_config(job, Layout()), tokens.device)
    drawn(model.parameters())
    return model, loss_of(model, tokens)


def loss_of(model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    places = torch.arange(tokens.shape[1] - 1, device=tokens.device)[None]
    counted = torch.full(tokens[:, 1:].shape, 1 / tokens[:, 1:].numel(), device=tokens.device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return lambda: model(inputs, places, None, labels=labels, loss_mask=counted)


def _megatron(job: JobSpec, tokens: Tensor) -> Step:
    """As it comes without TransformerEngine."""
    config = transformer_config(job, Layout())
    config.moe_router_pre_softmax, config.moe_router_enable_expert_bias = False, False
    config.moe_router_score_function = job.model.router_score
    config.bias_activation_fusion = config.apply_rope_fusion = False
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=job.model.experts, moe_grouped_gemm=False, normalization="RMSNorm"
        ),
        vocab_size=job.model.vocab,
        max_sequence_length=job.train.sequence_length,
        position_embedding_type="rope",
    ).to(tokens.device)
    drawn(model.parameters())
    length = tokens.shape[1] - 1
    mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)[None, None]
    places = torch.arange(length, device=tokens.device)[None]
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return forward_backward(model, lambda: model(inputs, places, mask, labels=labels).mean())


def _transformers(job: JobSpec, tokens: Tensor, *, compiled: bool) -> Step:
    import transformers

    described = job.model
    sizes = {
        "num_hidden_layers": described.layers,
        "vocab_size": described.vocab,
        "hidden_size": described.hidden,
        "num_attention_heads": described.heads,
        "num_key_value_heads": described.kv_heads,
        "num_experts_per_tok": described.top_k,
        "max_position_embeddings": job.train.sequence_length,
        "attn_implementation": "sdpa",
        "experts_implementation": "grouped_mm",
    }
    if described.shared_expert_ffn:
        config = transformers.Qwen2MoeConfig(
            **sizes,
            num_experts=described.experts,
            moe_intermediate_size=described.expert_ffn,
            shared_expert_intermediate_size=described.shared_expert_ffn,
            decoder_sparse_step=1,
        )
        kind = transformers.Qwen2MoeForCausalLM
    else:
        config = transformers.MixtralConfig(
            **sizes, num_local_experts=described.experts, intermediate_size=described.expert_ffn
        )
        kind = transformers.MixtralForCausalLM
    dtype = torch.bfloat16 if tokens.is_cuda else torch.float32
    with torch.device(tokens.device):
        model = kind(config).to(dtype)
    drawn(model.parameters())
    model.train()
    call = torch.compile(model) if compiled else model
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return forward_backward(model, lambda: call(input_ids=inputs, labels=labels, use_cache=False).loss)


def _graphed(job: JobSpec, tokens: Tensor) -> Step:
    """Recorded once and replayed: what the host's part costs."""
    step = _ours(job, tokens)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # a recording allows no first calls
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def again() -> None:
        graph.replay()
        _ = step  # whose tensors the recording reads

    return again


def _deepspeed(job: JobSpec, tokens: Tensor) -> Step:
    """As the DeepSpeed engine has it, without ZeRO."""
    from models.deepspeed_experts import group_experts

    return _reference(job, tokens, lambda decoder: group_experts(decoder, None))


def _deepspeed_moe(job: JobSpec, tokens: Tensor) -> Step:
    """The same around DeepSpeed's own MoE layers, which drop nothing."""
    import deepspeed

    deepspeed.init_distributed(dist_init_required=False)

    def with_theirs(decoder: nn.Module) -> None:
        for layer in decoder.layers.values():
            layer.moe = _TheirMoE(job, layer.moe).to(layer.moe.router.weight.dtype)

    return _reference(job, tokens, with_theirs)


class _TheirMoE(nn.Module):
    def __init__(self, job: JobSpec, moe: MoE) -> None:
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        super().__init__()
        model = job.model
        self.shared = moe.shared
        self.routed = DeepSpeedMoE(
            model.hidden, moe.experts[0], num_experts=model.experts, k=model.top_k, drop_tokens=False, use_rts=False
        )
        self.routed.set_deepspeed_parallelism()

    def forward(self, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        out, _, _ = self.routed(hidden)
        return out if self.shared is None else out + self.shared(hidden), hidden.new_zeros(())


def _reference(job: JobSpec, tokens: Tensor, change: Callable[[nn.Module], None]) -> Step:
    from models import deepspeed_fusions

    with torch.device("meta"):
        decoder = Stage(job.model, range(job.model.layers))
        deepspeed_fusions.install(decoder)
    change(decoder)
    dtype = torch.bfloat16 if tokens.is_cuda else torch.float32
    decoder = decoder.to(dtype).to_empty(device=tokens.device)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1:
            nn.init.constant_(parameter, float(name.endswith("norm.weight")))
    drawn(decoder.parameters())
    decoder.auxiliary_weight = 0.0
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
    context = Context(positions_of(inputs, None))
    counted = torch.full(labels.shape, 1 / labels.numel(), device=tokens.device)

    def loss_of() -> Tensor:
        decoder.contexts = iter((context,))
        return linear_cross_entropy(decoder.run(inputs).flatten(0, 1), decoder.head_weight, labels, counted)

    return forward_backward(decoder, loss_of)


_WAYS: dict[str, Callable[[JobSpec, Tensor], Step]] = {
    "fivefold": _ours,
    "fivefold, deterministic": _deterministic,
    "fivefold, in a CUDA graph": _graphed,
    "fivefold, deepspeed": _deepspeed,
    "deepspeed moe": _deepspeed_moe,
    "megatron-core": _megatron,
    "transformers": lambda job, tokens: _transformers(job, tokens, compiled=False),
    "transformers, compiled": lambda job, tokens: _transformers(job, tokens, compiled=True),
}
