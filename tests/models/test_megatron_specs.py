from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from jobs.architecture import ModelArchitecture
from jobs.spec import CheckpointSpec, ClusterSpec, DataSpec, JobSpec, LayoutSpec, PolicySpec, TrainSpec
from models.megatron_attention import CausalAttention
from models.megatron_specs import RMSNorm, transformer_config
from parallel.layout import Layout

MODEL = {
    "name": "tiny",
    "layers": 3,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "ffn": 48,
    "vocab": 64,
    "experts": 4,
    "top_k": 2,
    "expert_ffn": 24,
}


def job(**changes: object) -> JobSpec:
    return JobSpec(
        name="tiny",
        model=ModelArchitecture(**{**MODEL, **changes}),
        data=DataSpec(files=("unused",)),
        cluster=ClusterSpec(name="test", device="cpu", hardware="laptop", devices_per_node=8),
        layout=LayoutSpec(),
        train=TrainSpec(steps=1, sequence_length=16, global_batch=8, precision="bf16", learning_rate=1e-3),
        checkpoint=CheckpointSpec(interval=1),
        policy=PolicySpec(),
    )


@pytest.fixture
def one_rank() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_rms_norm_is_root_mean_square_in_plain_torch() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True), hidden_size=24, eps=1e-3)
    norm.weight.data.normal_()
    hidden = torch.randn(5, 3, 24)
    plain = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(hidden), plain)
    assert norm.weight.sequence_parallel is True


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_causal_attention_is_masked_softmax_over_grouped_heads(one_rank: dist.ProcessGroup, kv_heads: int) -> None:
    torch.manual_seed(0)
    sequence, batch, heads, width = 7, 2, 6, 8
    query = torch.randn(sequence, batch, heads, width)
    key, value = torch.randn(2, sequence, batch, kv_heads, width)
    found = CausalAttention(SimpleNamespace(), pg_collection=SimpleNamespace(cp=one_rank))(query, key, value)
    shared = [part.repeat_interleave(heads // kv_heads, dim=2) for part in (key, value)]
    scores = torch.einsum("qbnd,kbnd->bnqk", query, shared[0]) / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(sequence, sequence).triu(1).bool(), -math.inf)
    plain = torch.einsum("bnqk,kbnd->qbnd", scores.softmax(-1), shared[1]).reshape(sequence, batch, heads * width)
    torch.testing.assert_close(found, plain)


def test_configuration_says_what_the_job_says() -> None:
    layout = Layout(tp=2, dp=2, pp=3, ep=4)
    mixtral = transformer_config(job(aux_loss=0.02), layout)
    assert (mixtral.tensor_model_parallel_size, mixtral.pipeline_model_parallel_size) == (2, 3)
    assert (mixtral.expert_model_parallel_size, mixtral.expert_tensor_parallel_size) == (4, 1)
    assert mixtral.sequence_parallel
    assert (mixtral.bf16, mixtral.params_dtype, mixtral.moe_router_dtype) == (True, torch.bfloat16, "fp32")
    assert (mixtral.kv_channels, mixtral.num_query_groups, mixtral.moe_ffn_hidden_size) == (16, 2, 24)
    assert mixtral.moe_layer_freq == 1
    assert (mixtral.moe_router_load_balancing_type, mixtral.moe_aux_loss_coeff) == ("seq_aux_loss", 0.02)
    qwen = transformer_config(job(router_normalize_top_k=False, first_dense_layers=2, attention_bias=True), Layout())
    assert (qwen.moe_layer_freq, qwen.add_qkv_bias) == ([0, 0, 1], True)
    assert not qwen.sequence_parallel
