"""Where the model's tensors lie in Megatron's: query, key and value are one weight there, gate and up are another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from jobs.architecture import ModelArchitecture
from models.weights import Shard, whole
from parallel.layout import Layout


def megatron_shards(
    module: nn.Module,
    model: ModelArchitecture,
    layout: Layout,
    rank: int,
    kept: Callable[[nn.Parameter], Tensor] | None = None,
) -> Iterator[Shard]:
    """The blocks of `jobs.tensors` that `rank` holds in `module`, a GPTModel (one virtual stage of it), replicas too.

    The last stage's copy of a tied embedding is given as well. `kept` gives what an optimizer keeps of a parameter, of
    its shape, and only of parameters; without it, blocks are of the parameters themselves and of router biases.
    """
    at = layout.coordinates(rank)
    cut = _Cut(model, layout, at)
    for name, parameter in module.named_parameters():
        yield from cut.of(_global_name(name, module), kept(parameter) if kept else parameter.data)
    for name, buffer in module.named_buffers():
        if kept is None and name.endswith(".router.expert_bias"):
            yield from cut.of(_global_name(name, module), buffer)


def whole_shards(name: str, tensor: Tensor, model: ModelArchitecture) -> Iterator[Shard]:
    """What of `jobs.tensors` is in an undivided tensor of Megatron's, whose name counts layers in the model."""
    undivided = Layout()
    return _Cut(model, undivided, undivided.coordinates(0)).of(name, tensor)


def _global_name(name: str, module: nn.Module) -> str:
    """Megatron counts a stage's layers from 0; each knows its place in the model."""
    if not name.startswith("decoder.layers."):
        return name
    _, _, index, rest = name.split(".", 3)
    return f"layers.{module.get_submodule(f'decoder.layers.{index}').layer_number - 1}.{rest}"


class _Cut:
    """Takes a rank's Megatron tensors apart."""

    def __init__(self, model: ModelArchitecture, layout: Layout, at: dict[str, int]) -> None:
        self._model, self._layout, self._at = model, layout, at

    def of(self, name: str, tensor: Tensor) -> Iterator[Shard]:
        match name.split("."):
            case ["embedding", "word_embeddings", "weight"]:
                yield self._rows("embedding.weight", tensor, "tp")
            case ["output_layer", "weight"]:
                tied = self._model.tied_embeddings
                yield self._rows("embedding.weight" if tied else "head.weight", tensor, "tp")
            case ["decoder", "final_layernorm", "weight"]:
                yield whole("norm.weight", tensor)
            case ["layers", index, *rest]:
                yield from self._layer(f"layers.{index}", ".".join(rest), tensor)
            case _:
                raise ValueError(f"{name} is not known")

    def _layer(self, layer: str, name: str, tensor: Tensor) -> Iterator[Shard]:
        match name.split("."):
            case ["input_layernorm", "weight"]:
                yield whole(f"{layer}.attention_norm.weight", tensor)
            case ["pre_mlp_layernorm", "weight"]:
                yield whole(f"{layer}.ffn_norm.weight", tensor)
            case ["self_attention", "linear_qkv", kind]:
                yield from self._query_key_value(f"{layer}.attention", kind, tensor)
            case ["self_attention", "linear_proj", "weight"]:
                yield self._columns(f"{layer}.attention.output.weight", tensor, "tp")
            case ["self_attention", "q_layernorm", "weight"]:
                yield whole(f"{layer}.attention.query_norm.weight", tensor)
            case ["self_attention", "k_layernorm", "weight"]:
                yield whole(f"{layer}.attention.key_norm.weight", tensor)
            case ["mlp", "router", "weight"]:
                yield whole(f"{layer}.moe.router.weight", tensor)
            case ["mlp", "router", "expert_bias"]:
                yield whole(f"{layer}.moe.router.bias", tensor)
            case ["mlp", "shared_experts", "gate_weight"]:
                yield whole(f"{layer}.moe.shared_gate.weight", tensor)
            case ["mlp", "shared_experts", linear, "weight"]:
                yield from self._swiglu(f"{layer}.moe.shared", linear, tensor, "tp")
            case ["mlp", "experts", "local_experts", local, linear, "weight"]:
                index = int(local) + self._at["ep"] * self._model.experts // self._layout.ep
                yield from self._swiglu(f"{layer}.moe.experts.{index}", linear, tensor, "etp")
            case ["mlp", "experts", "gate_up" | "down" as stack]:
                linear = "linear_fc1" if stack == "gate_up" else "linear_fc2"
                for local in range(len(tensor)):
                    yield from self._layer(layer, f"mlp.experts.local_experts.{local}.{linear}.weight", tensor[local])
            case ["mlp", linear, "weight"]:
                yield from self._swiglu(f"{layer}.ffn", linear, tensor, "tp")
            case _:
                raise ValueError(f"{layer}.{name} is not known")

    def _query_key_value(self, name: str, kind: str, tensor: Tensor) -> Iterator[Shard]:
        """One weight, a query group after another: the group's queries, its key, its value."""
        model = self._model
        grouped = model.heads // model.kv_heads
        groups = tensor.view(-1, grouped + 2, model.head_dim, *tensor.shape[1:])
        parts = (
            ("query", slice(0, grouped)),
            ("key", slice(grouped, grouped + 1)),
            ("value", slice(grouped + 1, None)),
        )
        for part, heads in parts:
            yield self._rows(f"{name}.{part}.{kind}", groups[:, heads], "tp", flat=3)

    def _swiglu(self, name: str, linear: str, tensor: Tensor, axis: str) -> Iterator[Shard]:
        if linear == "linear_fc2":
            yield self._columns(f"{name}.down.weight", tensor, axis)
        else:
            gate, up = tensor.chunk(2)
            yield self._rows(f"{name}.gate.weight", gate, axis)
            yield self._rows(f"{name}.up.weight", up, axis)

    def _rows(self, name: str, tensor: Tensor, axis: str, flat: int = 1) -> Shard:
        """Cut along the first dimension, which the tensor's first `flat` ones make together."""
        rows, rest = tensor.shape[:flat].numel(), tuple(tensor.shape[flat:])
        total, start = rows * self._layout.degree(axis), rows * self._at[axis]
        return Shard(name, (total, *rest), (start,) + (0,) * len(rest), (rows, *rest), tensor)

    def _columns(self, name: str, tensor: Tensor, axis: str) -> Shard:
        rows, columns = tensor.shape
        degree, index = self._layout.degree(axis), self._at[axis]
        return Shard(name, (rows, columns * degree), (0, columns * index), (rows, columns), tensor)
