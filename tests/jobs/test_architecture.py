"""Counts of parameters and FLOPs, against published totals and against tensor shapes written out by hand."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.architecture import ModelArchitecture

CONF = Path(__file__).parents[2] / "jobs" / "conf" / "model"

# (total, active), as the models' public Hugging Face configurations give them.
PUBLISHED = {
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral_8x22b": (140_620_634_112, 39_152_031_744),
    "qwen2_57b_a14b": (57_408_658_944, 14_249_270_784),
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704),
    "deepseek_v3": (671_026_404_352, 37_552_282_624),
    "llama3_8b": (8_030_261_248, 8_030_261_248),
    "llama3_70b": (70_553_706_496, 70_553_706_496),
}


def load(name: str) -> ModelArchitecture:
    return ModelArchitecture(**yaml.safe_load((CONF / f"{name}.yaml").read_text()))


def shapes(model: ModelArchitecture, experts: int) -> dict[str, tuple[int, ...]]:
    """Every trained tensor of a Hugging Face checkpoint of this model, `experts` routed experts a layer."""
    h, found = model.hidden, {"embed_tokens": (model.vocab, model.hidden), "norm": (model.hidden,)}
    if not model.tied_embeddings:
        found["lm_head"] = (model.vocab, h)
    for layer in range(model.layers):
        tensors: dict[str, tuple[int, ...]] = {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
        if model.kv_lora_rank:
            query_head = model.head_dim + model.rope_head_dim
            if model.q_lora_rank:
                tensors |= {"q_a_proj": (model.q_lora_rank, h), "q_a_layernorm": (model.q_lora_rank,)}
                tensors["q_b_proj"] = (model.heads * query_head, model.q_lora_rank)
            else:
                tensors["q_proj"] = (model.heads * query_head, h)
            tensors["kv_a_proj_with_mqa"] = (model.kv_lora_rank + model.rope_head_dim, h)
            tensors["kv_a_layernorm"] = (model.kv_lora_rank,)
            tensors["kv_b_proj"] = (model.heads * (model.head_dim + model.value_head_dim), model.kv_lora_rank)
            tensors["o_proj"] = (h, model.heads * model.value_head_dim)
        else:
            for name, heads in (("q", model.heads), ("k", model.kv_heads), ("v", model.kv_heads)):
                tensors[f"{name}_proj"] = (heads * model.head_dim, h)
                if model.attention_bias:
                    tensors[f"{name}_proj.bias"] = (heads * model.head_dim,)
                if model.qk_norm and name != "v":
                    tensors[f"{name}_norm"] = (model.head_dim,)
            tensors["o_proj"] = (h, model.heads * model.head_dim)
        widths = {"mlp": model.ffn}
        if model.experts and layer >= model.first_dense_layers:
            tensors["gate"] = (model.experts, h)
            widths = {f"expert{index}": model.expert_ffn for index in range(experts)}
            if model.shared_expert_ffn:
                widths["shared"] = model.shared_expert_ffn
            if model.shared_expert_gate:
                tensors["shared_expert_gate"] = (1, h)
        for block, width in widths.items():
            tensors |= {f"{block}.up": (width, h), f"{block}.down": (h, width)}
            tensors |= {f"{block}.gate": (width, h)} if model.gated else {}
        found |= {f"layers.{layer}.{name}": shape for name, shape in tensors.items()}
    return found


def matmul_flops(model: ModelArchitecture, sequence_length: int) -> int:
    """Forward and backward FLOPs a token: every matrix a token meets, and causal attention, each counted here anew."""
    met = shapes(model.model_copy(update={"tied_embeddings": False}), model.top_k)
    weights = sum(prod(shape) for name, shape in met.items() if len(shape) == 2 and name != "embed_tokens")
    query_key = model.head_dim + model.rope_head_dim
    value = model.value_head_dim or model.head_dim
    seen = sequence_length / 2  # of each other token, on the mean
    return 3 * int(2 * weights + model.layers * 2 * model.heads * seen * (query_key + value))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name: str) -> None:
    model = load(name)
    assert (model.parameters, model.active_parameters) == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_shipped_models_name_themselves(name: str) -> None:
    assert load(name).name == name


def test_deepseek_v3_publishes_its_balancing_biases_too() -> None:
    model = load("deepseek_v3")
    assert model.parameters + model.moe_layers * model.experts == 671_026_419_200


def test_moe_1b_is_a_billion() -> None:
    assert load("moe_1b").parameters == pytest.approx(1e9, rel=0.01)


@st.composite
def architectures(draw: st.DrawFn) -> ModelArchitecture:
    def number(low: int = 1, high: int = 12) -> int:
        return draw(st.integers(low, high))

    kv_heads, experts, latent = number(high=4), draw(st.sampled_from([0, 0, 3, 8])), draw(st.booleans())
    shared = number(0) if experts else 0
    return ModelArchitecture(
        name="drawn",
        layers=number(high=5),
        hidden=number(),
        heads=kv_heads * number(high=3),
        kv_heads=kv_heads,
        head_dim=number(),
        ffn=number(),
        vocab=number(2),
        gated=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        attention_bias=not latent and draw(st.booleans()),
        qk_norm=not latent and draw(st.booleans()),
        experts=experts,
        top_k=min(experts, 2),
        expert_ffn=number() if experts else 0,
        shared_expert_ffn=shared,
        shared_expert_gate=bool(shared) and draw(st.booleans()),
        first_dense_layers=number(0, 6),
        **(
            {"kv_lora_rank": number(), "q_lora_rank": number(0), "rope_head_dim": number(), "value_head_dim": number()}
            if latent
            else {}
        ),
    )


@settings(deadline=None)
@given(architectures())
def test_counts_equal_the_tensors_written_out(model: ModelArchitecture) -> None:
    assert model.parameters == sum(map(prod, shapes(model, model.experts).values()))
    assert model.active_parameters == sum(map(prod, shapes(model, model.top_k).values()))


@settings(deadline=None)
@given(architectures(), st.integers(1, 64).map(lambda half: 2 * half))
def test_flops_equal_the_products_written_out(model: ModelArchitecture, sequence_length: int) -> None:
    assert model.flops_per_token(sequence_length) == matmul_flops(model, sequence_length)


def test_flops_of_llama3_8b_at_8k() -> None:
    """6 x (8.03B - 0.53B of the token table - norms) + 6 x 32 layers x 8192 x 4096 of causal attention."""
    matrices = 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    assert load("llama3_8b").flops_per_token(8192) == 6 * matrices + 6 * 32 * 8192 * 4096


def test_latent_attention_needs_its_widths() -> None:
    fields = load("deepseek_v3").model_dump() | {"rope_head_dim": 0}
    with pytest.raises(ValidationError, match="kv_lora_rank=512 needs rope_head_dim and value_head_dim above 0"):
        ModelArchitecture(**fields)


def test_a_gate_needs_the_shared_experts_that_it_gates() -> None:
    fields = load("qwen2_57b_a14b").model_dump() | {"shared_expert_ffn": 0}
    with pytest.raises(ValidationError, match="shared_expert_gate=True needs shared_expert_ffn above 0"):
        ModelArchitecture(**fields)
