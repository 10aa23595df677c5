"""Names and config.json of published repositories, both ways, without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from families import FAMILIES

from jobs.architecture import ModelArchitecture
from jobs.compose import compose, job_names
from jobs.errors import InputError
from jobs.tensors import tensors
from models.huggingface_names import config, disagreements, family, names

SHIPPED = {name: compose(name, []).model for name in job_names()}
EXPORTED = {name: model for name, model in SHIPPED.items() if not model.is_multi_latent}

# What the public repositories say, as far as it decides what is computed (and some that does not).
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral_8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "qwen2_57b_a14b": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_window_layers": 28,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 2560,
        "norm_topk_prob": False,
        "num_attention_heads": 28,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "shared_expert_intermediate_size": 20480,
        "sliding_window": 65536,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3_30b_a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "llama3_8b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
}


@pytest.mark.parametrize("job", PUBLISHED)
def test_the_published_config_is_the_shipped_model(job: str) -> None:
    assert disagreements(PUBLISHED[job], SHIPPED[job], "config.json") == []
    ours = config(SHIPPED[job], "bfloat16", 4096)
    free = {"max_position_embeddings", "intermediate_size"}  # which Qwen's models without dense layers do not use
    compared = [key for key in PUBLISHED[job] if key in ours and key not in free]
    assert {key: ours[key] for key in compared} == {key: PUBLISHED[job][key] for key in compared}


@pytest.mark.parametrize("model", [*EXPORTED.values(), *FAMILIES.values()], ids=lambda model: model.name)
def test_a_written_config_is_read_as_the_same_model(model: ModelArchitecture) -> None:
    written = config(model, "bfloat16", 4096)
    assert disagreements(written, model, "config.json") == []
    moved = {key: value for key, value in written.items() if key != "rope_theta"}  # as transformers 5 writes it
    moved["rope_parameters"] = {"rope_theta": model.rope_theta, "rope_type": "default"}
    assert disagreements(moved, model, "config.json") == []
    assert [error.path for error in disagreements(moved, _with(model, rope_theta=7.0), "c")] == ["model.rope_theta"]


@pytest.mark.parametrize("model", [*EXPORTED.values(), *FAMILIES.values()], ids=lambda model: model.name)
def test_every_tensor_has_a_name_of_its_own(model: ModelArchitecture) -> None:
    found = names(model)
    assert list(found) == list(tensors(model))
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
    ("model", "ours", "theirs"),
    [
        ("mixtral_8x7b", "layers.31.moe.experts.7.down.weight", "model.layers.31.block_sparse_moe.experts.7.w2.weight"),
        ("mixtral_8x7b", "layers.0.moe.router.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("qwen2_57b_a14b", "layers.3.attention.key.bias", "model.layers.3.self_attn.k_proj.bias"),
        ("qwen2_57b_a14b", "layers.3.moe.shared.up.weight", "model.layers.3.mlp.shared_expert.up_proj.weight"),
        ("qwen2_57b_a14b", "layers.3.moe.shared_gate.weight", "model.layers.3.mlp.shared_expert_gate.weight"),
        ("qwen3_30b_a3b", "layers.47.attention.query_norm.weight", "model.layers.47.self_attn.q_norm.weight"),
        ("qwen3_30b_a3b", "layers.9.moe.experts.127.up.weight", "model.layers.9.mlp.experts.127.up_proj.weight"),
        ("llama3_8b", "layers.9.ffn.gate.weight", "model.layers.9.mlp.gate_proj.weight"),
        ("llama3_8b", "layers.9.ffn_norm.weight", "model.layers.9.post_attention_layernorm.weight"),
        ("llama3_8b", "head.weight", "lm_head.weight"),
    ],
)
def test_names_are_those_of_the_public_repositories(model: str, ours: str, theirs: str) -> None:
    assert names(SHIPPED[model])[ours] == theirs


def test_each_family_is_chosen() -> None:
    assert {name: family(model).model_type for name, model in FAMILIES.items()} == {name: name for name in FAMILIES}


def _with(model: ModelArchitecture, **changes: object) -> ModelArchitecture:
    return ModelArchitecture.model_validate(model.model_dump() | changes)


@pytest.mark.parametrize(
    ("model", "field", "nearest"),
    [
        (SHIPPED["deepseek_v3"], "kv_lora_rank", 0),
        (_with(FAMILIES["mixtral"], router_score="sigmoid"), "router_score", "softmax"),
        (_with(FAMILIES["mixtral"], router_normalize_top_k=False), "router_normalize_top_k", True),
        (_with(FAMILIES["qwen2_moe"], shared_expert_gate=False), "shared_expert_gate", True),
        (_with(FAMILIES["llama"], attention_bias=True, qk_norm=True), "qk_norm", False),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_model_of_no_family_is_refused(model: ModelArchitecture, field: str, nearest: object) -> None:
    with pytest.raises(InputError, match="has no Hugging Face form") as refusal:
        names(model)
    assert (f"model.{field}", nearest) in [(error.path, error.nearest) for error in refusal.value.errors]


@pytest.mark.parametrize(
    ("changes", "path", "nearest"),
    [
        ({"hidden_size": 2048, "head_dim": 128}, "model.hidden", 2048),
        ({"rms_norm_eps": 1e-6}, "model.norm_epsilon", 1e-6),
        ({"num_local_experts": 16}, "model.experts", 16),
        ({"model_type": "mixtrl"}, "config.json", "mixtral"),
        ({"sliding_window": 4096}, "config.json", None),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "config.json", None),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}},
            "config.json",
            {"rope_type": "default", "rope_theta": 1e6},
        ),
        ({"hidden_act": "gelu"}, "config.json", "silu"),
        ({"num_attention_heads": "many", "head_dim": None}, "config.json", None),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused_by_its_field(changes: dict[str, Any], path: str, nearest: object) -> None:
    (error,) = disagreements(PUBLISHED["mixtral_8x7b"] | changes, SHIPPED["mixtral_8x7b"], "config.json")
    assert (error.path, error.nearest) == (path, nearest)


def test_all_fields_are_named_at_once() -> None:
    errors = disagreements(PUBLISHED["qwen3_30b_a3b"], SHIPPED["mixtral_8x7b"], "config.json")
    differing = {"qk_norm", "layers", "hidden", "kv_heads", "vocab", "norm_epsilon", "experts", "top_k", "expert_ffn"}
    assert {error.path for error in errors} == {f"model.{field}" for field in differing}
    del (lacking := dict(PUBLISHED["llama3_8b"]))["hidden_size"]
    (error,) = disagreements(lacking, SHIPPED["llama3_8b"], "config.json")
    assert str(error) == "config.json: lacks 'hidden_size'"


def test_it_imports_without_torch() -> None:
    code = "import models.huggingface_folder, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
