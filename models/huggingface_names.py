"""A model as Hugging Face's repositories write it: the names of its tensors and its config.json. Pure.

The names are those on disk (Mixtral-8x7B, Qwen2-57B-A14B, Qwen3-30B-A3B, Llama-3, ...), where each expert has tensors
of its own; transformers 5 fuses them in memory and writes them apart again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.architecture import ModelArchitecture
from jobs.errors import CombinedInputError, InputError, closest
from jobs.tensors import tensors

Config = dict[str, Any]

_OUTSIDE_LAYERS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER_PARTS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "moe.shared_gate": "mlp.shared_expert_gate",
}
_SWIGLU = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_MIXTRAL_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`."""

    model_type: str
    architecture: str
    """The class of transformers."""
    is_moe: bool
    fixed: dict[str, object]
    """Fields of ModelArchitecture that have one value in this family."""


_DENSE: dict[str, object] = {"kv_lora_rank": 0, "qk_norm": False, "attention_bias": False}
_MOE = _DENSE | {"shared_expert_ffn": 0, "router_score": "softmax", "router_bias": False, "router_scale": 1.0}
_QWEN2_MOE = {key: value for key, value in _MOE.items() if key not in ("attention_bias", "shared_expert_ffn")}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", False, _DENSE),
        Family("qwen2", "Qwen2ForCausalLM", False, _DENSE | {"attention_bias": True}),
        Family("qwen3", "Qwen3ForCausalLM", False, _DENSE | {"qk_norm": True}),
        Family("mixtral", "MixtralForCausalLM", True, _MOE | {"router_normalize_top_k": True, "first_dense_layers": 0}),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", True, _QWEN2_MOE | {"shared_expert_gate": True}),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", True, _MOE | {"qk_norm": True}),
    )
}


def family(model: ModelArchitecture) -> Family:
    """The one that computes what `model` does. InputError where there is none: what its nearest family would need."""
    nearest, misfits = min(
        ((kind, _misfits(kind, model)) for kind in FAMILIES.values() if kind.is_moe == model.is_moe),
        key=lambda candidate: len(candidate[1]),
    )
    if misfits:
        raise CombinedInputError(misfits)
    return nearest


def _misfits(kind: Family, model: ModelArchitecture) -> list[InputError]:
    return [
        InputError(
            f"model.{field}",
            getattr(model, field),
            f"has no Hugging Face form: {kind.model_type}, the family nearest to this model, has {value}",
            value,
        )
        for field, value in kind.fixed.items()
        if getattr(model, field) != value
    ]


def names(model: ModelArchitecture) -> dict[str, str]:
    """Hugging Face's name of each of `jobs.tensors`, in the order of the model. InputError as `family`."""
    kind = family(model)
    return {name: _translated(name, kind) for name in tensors(model)}


def _translated(name: str, kind: Family) -> str:
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    _, index, *path, suffix = name.split(".")
    moe, linears = ("block_sparse_moe", _MIXTRAL_EXPERT) if kind.model_type == "mixtral" else ("mlp", _SWIGLU)
    match path:
        case ["ffn", linear]:
            part = f"mlp.{_SWIGLU[linear]}"
        case ["moe", "router"]:
            part = f"{moe}.gate"
        case ["moe", "experts", expert, linear]:
            part = f"{moe}.experts.{expert}.{linears[linear]}"
        case ["moe", "shared", linear]:
            part = f"mlp.shared_expert.{_SWIGLU[linear]}"
        case _:
            part = _LAYER_PARTS[".".join(path)]
    return f"model.layers.{index}.{part}.{suffix}"


def config(model: ModelArchitecture, dtype: str, sequence_length: int) -> Config:
    """`config.json` of a folder of `model`, its weights in `dtype` ("float32", "bfloat16"). InputError as `family`.

    Fields are spelled as published repositories spell them, which transformers 4 and 5 both read. No token is declared
    to begin or end a text: that is the tokenizer's to say.
    """
    kind = family(model)
    found: Config = {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "initializer_range": model.init_std,
        "intermediate_size": model.expert_ffn if kind.model_type == "mixtral" else model.ffn or model.expert_ffn,
        "max_position_embeddings": sequence_length,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": dtype,
        "vocab_size": model.vocab,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind.is_moe:
        found["num_local_experts" if kind.model_type == "mixtral" else "num_experts"] = model.experts
        found["num_experts_per_tok"] = model.top_k
        found["router_aux_loss_coef"] = model.aux_loss
    if kind.model_type in ("qwen2_moe", "qwen3_moe"):
        found["moe_intermediate_size"] = model.expert_ffn
        found["norm_topk_prob"] = model.router_normalize_top_k
        found["decoder_sparse_step"] = 1
        found["mlp_only_layers"] = list(range(model.dense_layers))
    if kind.model_type == "qwen2_moe":
        found["shared_expert_intermediate_size"] = model.shared_expert_ffn
        found["qkv_bias"] = model.attention_bias
    return found


def disagreements(found: Config, model: ModelArchitecture, path: str) -> list[InputError]:
    """How the model of a `config.json`, which stands at `path`, is not `model`: an error a field, none if it is.

    What decides training and not what is computed (initial weights, loss coefficients) is not compared.
    """
    kind = FAMILIES.get(str(found.get("model_type")))
    if kind is None:
        known = ", ".join(FAMILIES)
        near = closest(str(found.get("model_type")), FAMILIES)
        return [InputError(path, None, f"model_type {found.get('model_type')!r} is not one of {known}", near)]
    errors = [
        InputError(path, None, f"{field} {found[field]!r} is not what Fivefold computes", computed)
        for field, computed in _only(found, kind).items()
        if field in found and found[field] != computed
    ]
    try:
        theirs = _read(found, kind)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be understood: {error}"
        return [*errors, InputError(path, None, problem)]
    for field, there in theirs.items():
        here = getattr(model, field)
        if here != there:
            errors.append(InputError(f"model.{field}", here, f"is {there} in {path}", there))
    return errors


def _only(found: Config, kind: Family) -> Config:
    """Fields of a config that must have one value, where they are given."""
    only: Config = {"hidden_act": "silu", "mlp_bias": False, "decoder_sparse_step": 1, "rope_scaling": None}
    if kind.model_type in ("llama", "qwen3", "qwen3_moe"):
        only["attention_bias"] = False  # theirs is on the output projection too
    if kind.model_type == "mixtral":
        only["sliding_window"] = None
    else:
        only["use_sliding_window"] = False
    if isinstance(moved := found.get("rope_parameters"), dict):
        only["rope_parameters"] = {"rope_type": "default"} | {"rope_theta": moved.get("rope_theta")}
    return only


def _read(found: Config, kind: Family) -> dict[str, object]:
    """The fields of ModelArchitecture that a config decides, by transformers' defaults where it is silent."""
    heads = found["num_attention_heads"]
    theta = 1e6 if kind.model_type == "mixtral" else 1e4
    fields = kind.fixed | {
        "layers": found["num_hidden_layers"],
        "hidden": found["hidden_size"],
        "heads": heads,
        "kv_heads": found.get("num_key_value_heads") or heads,
        "head_dim": found.get("head_dim") or found["hidden_size"] // heads,
        "vocab": found["vocab_size"],
        "tied_embeddings": found.get("tie_word_embeddings", False),
        "rope_theta": (found.get("rope_parameters") or found).get("rope_theta", theta),
        "norm_epsilon": found["rms_norm_eps"],
    }
    dense = found.get("mlp_only_layers") or []
    if not kind.is_moe or dense:
        fields["ffn"] = found["intermediate_size"]
    if not kind.is_moe:
        return fields | {"experts": 0}
    fields["experts"] = found["num_local_experts"] if "num_local_experts" in found else found["num_experts"]
    fields["top_k"] = found["num_experts_per_tok"]
    if kind.model_type == "mixtral":
        return fields | {"expert_ffn": found["intermediate_size"]}
    if dense != list(range(len(dense))):
        raise ValueError(f"mlp_only_layers {dense} are not the first {len(dense)} layers")
    fields["expert_ffn"] = found["moe_intermediate_size"]
    fields["first_dense_layers"] = len(dense)
    fields["router_normalize_top_k"] = found.get("norm_topk_prob", False)
    if kind.model_type == "qwen2_moe":
        fields["shared_expert_ffn"] = found["shared_expert_intermediate_size"]
        fields["attention_bias"] = found.get("qkv_bias", True)
    return fields
