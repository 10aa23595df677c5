"""What a step asks of a device's memory, recorded: of a GPU by torch's allocator, of a CPU by who makes tensors.

The history of torch's caching allocator has all that `torch.cuda.max_memory_allocated` counts: tensors, and what
operations take for themselves. A CPU's allocator has none; there each operation's results are looked at, and what an
operation takes for itself is not seen.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kernels.rehearsal import rehearsing
from parallel.memory_forecast import Change, Forecast, Trace, forecast, lengths_of


def rehearse(step: Callable[[int], object], sequence: int, grain: int, device: torch.device) -> Forecast:
    """What a step of `sequence` tokens will need, told by shorter ones.

    step: runs one of so many tokens, a multiple of `grain`; what it computes is the caller's to forget.
    """
    first, *lengths = lengths_of(sequence, grain)
    with rehearsing(sequence / first):
        step(first)
    traces = []
    for length in lengths:
        with rehearsing(sequence / length), tracing(device) as trace:
            step(length)
        traces.append((length, trace))
    return forecast(traces, sequence)


@contextmanager
def tracing(device: torch.device) -> Iterator[Trace]:
    """The trace of what is run meanwhile; filled in when that has ended."""
    gc.collect()  # cycles of before are not to end in it
    trace = Trace()
    if device.type == "cpu":
        recorder = _Recorder(trace)
        with recorder:
            yield trace
        recorder.end()
    else:
        yield from _of_allocator(device, trace)


_OTHERWISE = (AttributeError, TypeError, RuntimeError, LookupError)
"""What is raised where torch has other functions, or others' results: they are documented, but their names private."""


def _of_allocator(device: torch.device, trace: Trace) -> Iterator[Trace]:
    try:
        torch.cuda.synchronize(device)
        torch.cuda.memory._record_memory_history("all", context=None, stacks="python")
    except _OTHERWISE as error:
        trace.failure = f"torch's allocator keeps no history: {error!r}"
        yield trace
        return
    trace.resident = torch.cuda.memory_allocated(device)
    try:
        yield trace
    except BaseException:
        torch.cuda.memory._record_memory_history(None)
        raise
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
        trace.changes += allocator_changes(torch.cuda.memory._snapshot()["device_traces"][index])
        torch.cuda.memory._record_memory_history(None)
    except _OTHERWISE as error:
        trace.failure = f"the history of torch's allocator is in another form: {error!r}"


def allocator_changes(entries: Iterable[dict[str, Any]]) -> list[Change]:
    """Of one device's entries in `torch.cuda.memory._snapshot()["device_traces"]`, as torch/cuda/memory.py has them.

    What a stream still reads when it is given up counts no more, as in `memory_allocated`. Segments are not tensors.
    """
    signs = {"alloc": 1, "free_requested": -1}
    return [
        Change(entry["addr"], signs[entry["action"]] * entry["size"])
        for entry in entries
        if entry["action"] in signs and entry["size"]
    ]


class _Recorder(TorchDispatchMode):
    """A storage is born with the operation that gives it, and dies when nothing has it, on whatever thread.

    One that was resized by itself, which is no operation, is seen to be when an operation is next given it.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace
        self._sizes: dict[int, int] = {}
        """Of storages that are there, by their addresses as objects of torch."""
        self._found: dict[int, Change] = {}
        """Of those that no operation has made, as they were first seen."""
        self._deaths: list[weakref.finalize[..., Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        for given in tree_iter((args, kwargs)):
            self._see(given, name, is_new=False)
        made = func(*args, **(kwargs or {}))
        for each in tree_iter(made):
            self._see(each, name, is_new=True)
        return made

    def end(self) -> None:
        """What was found and is still there was there before; what is gone, a collective made for itself."""
        for death in self._deaths:
            death.detach()
        self._trace.resident = sum(change.size for change in self._found.values())
        before = {id(change) for change in self._found.values()}
        self._trace.changes = [change for change in self._trace.changes if id(change) not in before]

    def _see(self, tensor: object, what: str, *, is_new: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if not storage.resizable():  # others' memory: NumPy's, or what stands for a host's
            return
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known == size:
            return
        if known is None:
            death = weakref.finalize(storage, self._die, key)
            death.atexit = False
            self._deaths.append(death)
        else:
            self._die(key)
        change = Change(key, size, what)
        if known is None and not is_new:
            self._found[key] = change
        self._sizes[key] = size
        self._trace.changes.append(change)

    def _die(self, key: int) -> None:
        self._found.pop(key, None)
        self._trace.changes.append(Change(key, -self._sizes.pop(key)))
