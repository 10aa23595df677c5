"""What Megatron-Core 0.16.1 needs before it runs here: on a machine without a GPU, and without TransformerEngine.

Megatron-Core names `torch.cuda` in its schedules, optimizer and dispatcher although most of that code works on any
device. `install` makes those names mean the CPU, so that Megatron's own code trains over gloo. It is for a worker whose
job says `cluster.device: cpu`; nothing else may call it, since it changes `torch` for the whole process.
`repair_megatron` corrects what is wrong on every device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from models.uncompiled import uncompiled
from orchestrator.worker.engines.adam import AdamW

with uncompiled():
    import megatron.core.optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.pipeline_parallel import p2p_communication
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

_CPU = torch.device("cpu")
_FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros")


class _Event:
    """Work on a CPU is done when the call returns, so an event has always happened."""

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    """The one queue of a CPU: the order of the program."""

    def __init__(self, device: torch.device | None = None) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def wait_event(self, event: _Event) -> None: ...

    def wait_stream(self, stream: _Stream) -> None: ...

    def synchronize(self) -> None: ...


_stream = _Stream()


def _use_stream(stream: _Stream) -> contextlib.AbstractContextManager[None]:
    """Which may be entered again, as torch's may: Megatron does."""
    return contextlib.nullcontext()


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory`, where device="cuda" means the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _type_as_if_on_cuda(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`, which without arguments says `torch.cuda.FloatTensor` for `torch.FloatTensor`."""

    @functools.wraps(type_of)
    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = type_of(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    return named


def _gather_uneven(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Megatron's all-gather along dimension 0, where given sizes go through an all-to-all of whole copies.

    Receives what an all-gather receives; gloo's refuses ranks that hold different numbers of tokens, which they do
    when experts are tensor-parallel.
    """

    @functools.wraps(gather)
    def gathered(tensor: torch.Tensor, group: Any, sizes: list[int] | None = None, *rest: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(tensor, group, sizes, *rest)
        out = tensor.new_empty(sum(sizes), *tensor.shape[1:])
        dist.all_to_all_single(out, torch.cat([tensor] * len(sizes)), sizes, [len(tensor)] * len(sizes), group)
        return out

    return gathered


def _reduce_scatter_uneven(reduce_scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Megatron's reduce-scatter along dimension 0, where given sizes go through an all-to-all and a local sum."""

    @functools.wraps(reduce_scatter)
    def scattered(tensor: torch.Tensor, group: Any, sizes: list[int] | None = None, *rest: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return reduce_scatter(tensor, group, sizes, *rest)
        kept = sizes[group.rank()]
        parts = tensor.new_empty(len(sizes), kept, *tensor.shape[1:])
        dist.all_to_all_single(parts.flatten(0, 1), tensor.contiguous(), [kept] * len(sizes), sizes, group)
        return parts.sum(0)

    return scattered


def install() -> None:
    """Make `torch.cuda` mean the CPU in this process. Calling it again changes nothing."""
    if torch.cuda.Stream is _Stream:
        return
    # Megatron passes current_device() as `device=`, where torch takes a device as well as an index.
    torch.cuda.current_device = lambda: _CPU
    # The dispatcher copies split sizes on a side stream; DDP and the schedules synchronise.
    torch.cuda.Stream = _Stream
    torch.cuda.Event = lambda *args, **kwargs: _Event()
    torch.cuda.stream = _use_stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: _stream
    torch.cuda.synchronize = lambda device=None: None
    # The device's random numbers are the CPU generator's. Left alone, Megatron's setter would queue a call for
    # the day CUDA is initialised, once a forward pass, and never draw from the state it thinks it set.
    torch.cuda.manual_seed = torch.default_generator.manual_seed
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # Counters and norms are made with device="cuda". Wrapping the factories costs nothing elsewhere; a
    # TorchFunctionMode would slow every torch call of the process.
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    # The distributed optimizer and gradient clipping compare type() with names of CUDA tensors.
    torch.Tensor.type = _type_as_if_on_cuda(torch.Tensor.type)
    mappings._gather_along_first_dim = _gather_uneven(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reduce_scatter_uneven(mappings._reduce_scatter_along_first_dim)


def repair_megatron() -> None:
    """Correct what is wrong in Megatron-Core without TransformerEngine, whatever the device. Idempotent."""
    # The router's fp32 path asks whether this is None, but only defines it where TransformerEngine imports.
    moe_utils.te_general_gemm = None
    # torch 2.13 wants all_to_all_single's split sizes as ints; the dispatcher passes NumPy arrays (CUDA) or
    # tensors (CPU).
    if not hasattr(token_dispatcher.all_to_all, "__wrapped__"):
        token_dispatcher.all_to_all = _with_int_splits(token_dispatcher.all_to_all)
    # Its default, False, is taken for a wish for fp8, which calls into TransformerEngine.
    megatron_random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    # With torch's AdamW the distributed optimizer cannot resume; with one like Apex's it can. See AdamW.
    megatron.core.optimizer.Adam = distrib_optimizer.Adam = AdamW
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def part_gradients_from_activations(gradients: dist.ProcessGroup) -> None:
    """Have two interleaved stages exchange gradients in a group of their own, of the same two ranks.

    With two stages the next rank is the previous one too, and both gloo and NCCL match messages between two ranks by
    their order alone. Megatron sends to the previous rank, then to the next, and receives in that order: each rank
    would take the other's gradient for its activation. Two groups are two channels, as more stages have by nature.
    """
    exchange = p2p_communication._batched_p2p_ops

    @functools.wraps(exchange)
    def apart(
        *,
        tensor_send_prev: torch.Tensor | None,
        tensor_recv_prev: torch.Tensor | None,
        tensor_send_next: torch.Tensor | None,
        tensor_recv_next: torch.Tensor | None,
        group: dist.ProcessGroup,
        **ranks: int,
    ) -> list[dist.Work]:
        nothing = {
            "tensor_send_prev": None,
            "tensor_recv_prev": None,
            "tensor_send_next": None,
            "tensor_recv_next": None,
        }
        activations = {"tensor_recv_prev": tensor_recv_prev, "tensor_send_next": tensor_send_next}
        of_gradients = {"tensor_send_prev": tensor_send_prev, "tensor_recv_next": tensor_recv_next}
        return [
            *exchange(**{**nothing, **activations}, group=group, **ranks),
            *exchange(**{**nothing, **of_gradients}, group=gradients, **ranks),
        ]

    p2p_communication._batched_p2p_ops = apart


def _with_int_splits(all_to_all: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(all_to_all)
    def exchange(group: Any, tensor: torch.Tensor, received: Any = None, sent: Any = None) -> torch.Tensor:
        return all_to_all(
            group,
            tensor,
            None if received is None else received.tolist(),
            None if sent is None else sent.tolist(),
        )

    return exchange
