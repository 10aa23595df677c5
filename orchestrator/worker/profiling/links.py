"""What joins the devices of a machine to each other and to the host. Each function runs on all ranks at once."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.worker.profiling.timing import BATCHES, MOST_CALLS, Call, gpu_batch, idle, sample, tell

TOTAL_BYTES = {
    "cuda": (2**16, 2**20, 2**23, 2**26, 2**28, 2**30),
    "cpu": (2**12, 2**18, 2**22),
}
"""That each rank holds before an all-reduce or an all-to-all, or after an all-gather."""
COPIED_BYTES = (2**16, 2**20, 2**24, 2**28)
_ADAM_PARAMETERS = {"cuda": 2**25, "cpu": 2**23}


def group_sizes(world: int) -> tuple[int, ...]:
    """Powers of two while ranks are dealt out evenly, and all."""
    powers = (2**power for power in range(1, world.bit_length()))
    return tuple(sorted({world, *(size for size in powers if world % size == 0)}))


def collective(rank: int, kind: str, name: str, free_bytes: int, seconds: float) -> None:
    """One collective at every group size and number of bytes; all groups of a size work at once, as in training."""
    device, world = _device(kind, rank), dist.get_world_size()
    sizes = [size for size in TOTAL_BYTES[kind] if size <= free_bytes // 8]
    groups = (2,) if name == "send" else group_sizes(world)
    for size in groups:
        made = [dist.new_group(list(range(first, first + size))) for first in range(0, world - size + 1, size)]
        ours = made[rank // size] if rank // size < len(made) else None
        for total in sizes:
            if rank == 0:
                tell(doing=f"{name} of {size}")
            call = _call(name, device, ours, size, total)
            taken = _together(call, device, seconds / len(sizes) / len(groups))
            if rank == 0:
                sample(name, taken, bytes=total, size=size)


def host(rank: int, kind: str, free_bytes: int, seconds: float) -> None:
    """Copies to and from pinned memory of the host, and Adam there: of every device at once, for they share the host.

    On a GPU also what a rank holds that is not a tensor's. Torch's fused Adam reads weight, gradient and two moments
    and writes all but the gradient: 28 bytes a parameter.
    """
    world, device = dist.get_world_size(), _device(kind, rank)
    if rank == 0:
        tell(doing="host")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    parameter = torch.nn.Parameter(torch.randn(min(_ADAM_PARAMETERS[kind], free_bytes // 64)))
    parameter.grad = torch.randn_like(parameter)
    adam = torch.optim.Adam([parameter], fused=True)
    taken = _together(adam.step, torch.device("cpu"), seconds / 4)
    if rank == 0:
        sample("host_adam", taken, "fp32", bytes=28 * parameter.numel())
    if kind != "cuda":
        return
    for size in (each for each in COPIED_BYTES if each <= free_bytes // 8):
        there = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        here = torch.empty(size, dtype=torch.uint8, device=device)
        for name, to, source in (("to_device", here, there), ("to_host", there, here)):
            taken = _together(_copy(to, source), device, seconds / 4 / len(COPIED_BYTES))
            if rank == 0:
                sample(name, taken, bytes=size)
    # Beside the one of all ranks a communicator for each axis over which so many devices can be divided, and one for
    # the experts'; and the workspace of products.
    weight = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16)
    for _ in range(world.bit_length()):
        dist.all_reduce(weight @ weight, group=dist.new_group(list(range(world))))
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    if rank == 0:
        tell(machine={"reserved_bytes": total - free - torch.cuda.memory_reserved()})


def _copy(to: Tensor, source: Tensor) -> Call:
    return lambda: to.copy_(source, non_blocking=True)


def _device(kind: str, rank: int) -> torch.device:
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)


def _call(name: str, device: torch.device, group: dist.ProcessGroup | None, size: int, total: int) -> Call | None:
    """The collective on buffers of its own; None on ranks that are in no group."""
    if group is None:
        return None
    whole = torch.zeros(total // 4, dtype=torch.float32, device=device)
    part = torch.zeros(total // 4 // size, dtype=torch.float32, device=device)
    other = torch.zeros_like(whole) if name == "all_to_all" else None
    peers = dist.get_process_group_ranks(group)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole[: part.numel() * size], part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole[: part.numel() * size], group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "send": lambda: (
            dist.send(whole, peers[1], group=group)
            if dist.get_rank() == peers[0]
            else dist.recv(whole, peers[0], group=group)
        ),
    }
    return calls[name]


def _together(call: Call | None, device: torch.device, seconds: float) -> float:
    """Median seconds of a call that all ranks make at once and as often: of the slowest rank, each time."""

    def slowest(number: int) -> float:
        return _agreed(_batch(call, device, number)) / number

    slowest(1)
    number = max(1, min(MOST_CALLS, int(seconds / BATCHES / max(slowest(2), 1e-7))))
    return statistics.median(slowest(number) for _ in range(BATCHES))


def _batch(call: Call | None, device: torch.device, number: int) -> float:
    _agreed(0.0)  # all ranks begin together
    if call is None:
        return 0.0
    if device.type == "cuda":
        return gpu_batch([call], number, idle)
    start = time.perf_counter()
    for _ in range(number):
        call()
    return time.perf_counter() - start


def _agreed(value: float) -> float:
    """The largest of all ranks' values, by gloo."""
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)
