"""The tensors of a model by name: one set of names, whatever the engine, the layout or the file they came from."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.architecture import ModelArchitecture

Shape = tuple[int, ...]

ROUTER_BIAS = ".moe.router.bias"
"""Ends the name of a balancing bias, which is set by rule and not trained."""


def tensors(model: ModelArchitecture) -> dict[str, Shape]:
    """Name and shape of every tensor, in the order of the model. Linear weights are [out, in].

    The names are those of `models.reference.Decoder`. A tied head is the embedding, and has no name of its own.
    ValueError for multi-latent attention, which has none yet.
    """
    if model.is_multi_latent:
        raise ValueError(f"{model.name}: multi-latent attention")
    return dict(_tensors(model))


def _tensors(model: ModelArchitecture) -> Iterator[tuple[str, Shape]]:
    yield "embedding.weight", (model.vocab, model.hidden)
    for index in range(model.layers):
        layer = f"layers.{index}"
        yield f"{layer}.attention_norm.weight", (model.hidden,)
        yield from _attention(f"{layer}.attention", model)
        yield f"{layer}.ffn_norm.weight", (model.hidden,)
        if index < model.dense_layers:
            yield from _swiglu(f"{layer}.ffn", model.hidden, model.ffn)
        else:
            yield from _moe(f"{layer}.moe", model)
    yield "norm.weight", (model.hidden,)
    if not model.tied_embeddings:
        yield "head.weight", (model.vocab, model.hidden)


def _attention(name: str, model: ModelArchitecture) -> Iterator[tuple[str, Shape]]:
    for part, heads in (("query", model.heads), ("key", model.kv_heads), ("value", model.kv_heads)):
        yield f"{name}.{part}.weight", (heads * model.head_dim, model.hidden)
        if model.attention_bias:
            yield f"{name}.{part}.bias", (heads * model.head_dim,)
    if model.qk_norm:
        yield f"{name}.query_norm.weight", (model.head_dim,)
        yield f"{name}.key_norm.weight", (model.head_dim,)
    yield f"{name}.output.weight", (model.hidden, model.heads * model.head_dim)


def _moe(name: str, model: ModelArchitecture) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.router.weight", (model.experts, model.hidden)
    if model.router_bias:
        yield name.removesuffix(".moe") + ROUTER_BIAS, (model.experts,)
    for index in range(model.experts):
        yield from _swiglu(f"{name}.experts.{index}", model.hidden, model.expert_ffn)
    if model.shared_expert_ffn:
        yield from _swiglu(f"{name}.shared", model.hidden, model.shared_expert_ffn)
        if model.shared_expert_gate:
            yield f"{name}.shared_gate.weight", (1, model.hidden)


def _swiglu(name: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.gate.weight", (width, hidden)
    yield f"{name}.up.weight", (width, hidden)
    yield f"{name}.down.weight", (hidden, width)
