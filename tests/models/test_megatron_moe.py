"""Routers one by one, and what recomputation saves: on one rank, without an engine."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.architecture import ModelArchitecture
from jobs.spec import CheckpointSpec, ClusterSpec, DataSpec, JobSpec, LayoutSpec, PolicySpec, TrainSpec
from models.megatron_shards import megatron_shards
from models.megatron_specs import build_model, transformer_config
from models.weights import drawn, fill
from orchestrator.worker.engines.cuda_stand_in import install, repair_megatron
from orchestrator.worker.ranks import Ranks
from parallel.layout import Layout

# isort: split
# After models.megatron_specs, which decides how Megatron is imported.
from megatron.core import parallel_state
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from models.megatron_moe import has_place

SEQUENCE, BATCH = 32, 2
MODEL = ModelArchitecture(
    name="tiny",
    layers=3,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=48,
    vocab=64,
    experts=4,
    top_k=2,
    expert_ffn=24,
    first_dense_layers=1,
    shared_expert_ffn=40,
    router_bias=True,
    aux_loss=0.01,
)


def job(layout: dict[str, Any], model: ModelArchitecture = MODEL) -> JobSpec:
    return JobSpec(
        name="tiny",
        model=model,
        data=DataSpec(files=("unused",)),
        cluster=ClusterSpec(name="test", device="cpu", hardware="laptop", devices_per_node=1),
        layout=LayoutSpec(**layout),
        train=TrainSpec(steps=1, sequence_length=SEQUENCE, global_batch=BATCH, precision="fp32", learning_rate=1e-3),
        checkpoint=CheckpointSpec(interval=1),
        policy=PolicySpec(),
    )


@pytest.mark.parametrize(("order", "factor"), [("position", 0.5), ("probs", 0.5), ("position", 1.3), ("probs", 1.3)])
def test_an_expert_keeps_the_earliest_or_the_heaviest(order: str, factor: float) -> None:
    # Megatron's "position" asks torch.topk for the largest of zeros and ones, which gives any of the ones.
    torch.manual_seed(0)
    tokens, experts, top_k = 1000, 8, 2
    weights = torch.randint(1, 50, (tokens, experts)) / 50.0  # of equal weights, the earlier goes first
    chosen = torch.zeros(tokens, experts, dtype=torch.bool).scatter(
        1, torch.rand(tokens, experts).topk(top_k).indices, True
    )
    weights = weights * chosen
    model: Any = SimpleNamespace(experts=experts, top_k=top_k, capacity_factor=factor, drop_order=order)
    kept = chosen & has_place(chosen, weights, model)
    capacity = math.ceil(tokens * top_k / experts * factor)
    dropped = 0
    for expert in range(experts):
        who = chosen[:, expert].nonzero().flatten().tolist()
        if order == "probs":
            who.sort(key=lambda token: (-weights[token, expert].item(), token))
        assert kept[:, expert].nonzero().flatten().tolist() == sorted(who[:capacity])
        dropped += len(who[capacity:])
    assert bool(dropped) == (factor < 1)


def _single(spec: JobSpec) -> torch.nn.Module:
    install()
    repair_megatron()
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    model = build_model(spec, transformer_config(spec, Layout()), torch.device("cpu"))
    fill(megatron_shards(model, spec.model, Layout(), 0), drawn(spec.model, seed=1))
    return model


def _loss(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % MODEL.vocab
    mask = torch.full(tokens.shape, 1 / tokens.numel())
    return model(tokens, torch.arange(SEQUENCE)[None], None, labels=tokens.flip(1), loss_mask=mask)


def _routers(model: torch.nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(".router")]


def test_loads_and_biases_are_counted_in_fp32_in_a_bf16_model(ranks: Ranks) -> None:
    loads, dtypes = ranks.run(1, _halved)[0]
    # bf16 counts to 256 and stays there.
    assert loads == [600.0] * MODEL.experts
    assert dtypes == {"weight": torch.bfloat16, "expert_bias": torch.float32, "local_tokens_per_expert": torch.float32}


def _halved(rank: int) -> tuple[list[float], dict[str, torch.dtype]]:
    router = _routers(_single(job({})).bfloat16())[0]
    for _ in range(600):
        router.local_tokens_per_expert += 1
    tensors = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    return router.local_tokens_per_expert.tolist(), {name: tensor.dtype for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def kept(ranks: Ranks) -> Any:
    """Bytes that forward keeps for backward, weights aside, with a layout's recomputation."""
    known: dict[str, int] = {}

    def of(*modules: str) -> int:
        layout: dict[str, Any] = {}
        if modules == ("full",):
            layout = {"recompute": "full"}
        elif modules:
            layout = {"recompute": "selective", "recompute_modules": modules}
        key = " ".join(modules)
        if key not in known:
            known[key] = ranks.run(1, _kept_bytes, job(layout))[0]
        return known[key]

    return of


def _kept_bytes(rank: int, spec: JobSpec) -> int:
    model = _single(spec)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model)
    # An output that is given back is a tensor whose storage is empty.
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in held}
    kept = sum(storage.nbytes() for storage in storages.values() if storage.data_ptr() not in weights)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return kept


def test_what_is_recomputed_is_not_kept(kept: Any) -> None:
    everything = kept()
    modules = ("core_attn", "layernorm", "mlp", "moe", "shared_experts", "full")
    saved = {module: everything - kept(module) for module in modules}
    # Bounds from below, in fp32 elements: what else is kept is for torch's kernels to say.
    token = 4 * SEQUENCE * BATCH
    assert saved["core_attn"] > 0  # of fused attention, a sum a head
    assert saved["layernorm"] >= token * MODEL.layers * 2 * MODEL.hidden
    assert saved["mlp"] >= token * MODEL.dense_layers * 3 * MODEL.ffn
    assert saved["shared_experts"] >= token * MODEL.moe_layers * 3 * MODEL.shared_expert_ffn
    routed = token * MODEL.moe_layers * MODEL.top_k
    # Of experts, their input, gate and up; neither their activation nor what the router's weights multiply.
    assert routed * (MODEL.hidden + 2 * MODEL.expert_ffn) <= saved["moe"] - saved["shared_experts"]
    assert saved["moe"] - saved["shared_experts"] < routed * (2 * MODEL.hidden + 3 * MODEL.expert_ffn)
    assert saved["full"] > saved["moe"] + saved["mlp"] + saved["layernorm"]
    assert everything - kept("mlp", "shared_experts") == saved["mlp"] + saved["shared_experts"]


def test_random_numbers_are_drawn_again_alike(ranks: Ranks) -> None:
    again, plain, after_again, after_plain = ranks.run(1, _noise)[0]
    assert again == plain
    assert after_again == after_plain


def _noise(rank: int) -> tuple[list[float], ...]:
    install()
    repair_megatron()
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand_like(x)

    found, after = [], []
    for forward in (lambda x: checkpoint(noisy, False, x), noisy):
        torch.manual_seed(3)
        model_parallel_cuda_manual_seed(3)
        x = torch.ones(8, requires_grad=True)
        out = forward(x)
        torch.rand(5)  # what comes between forward and backward
        out.sum().backward()
        found.append(x.grad.tolist())
        after.append(torch.rand(3).tolist())
    return (*found, *after)
