"""Runs a function on several ranks at once, forked from a process that already holds torch and the engines."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch
import torch.distributed as dist

ENGINES = ("pytest", "orchestrator.worker.engines.megatron", "orchestrator.worker.engines.deepspeed")


class Ranks:
    """Forks ranks from one server, so that a run costs what it computes and not its imports."""

    def __init__(self, device: Literal["cpu", "cuda"] = "cpu", preload: Sequence[str] = ENGINES) -> None:
        """`preload`: modules that the server imports, once for all ranks."""
        self._device = device
        os.environ["DS_ACCELERATOR"] = device  # read when DeepSpeed is imported, by the server
        if device == "cuda":
            # Counting GPUs through CUDA would initialise it in the server, after which no fork of it can use one.
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))

    def run(self, world: int, function: Callable[..., Any], *args: Any, seconds: float = 60) -> list[Any]:
        """What `function(rank, *args)` returned on each of `world` ranks, of gloo or, each with a GPU, of NCCL.

        `function` is a module's own, `args` and results can be pickled. The first rank that fails ends the others, and
        its traceback is raised here; ranks still running after `seconds` are killed.
        """
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        started: dict[Connection, tuple[int, Any]] = {}
        try:
            for rank in range(world):
                ours, theirs = self._context.Pipe(duplex=False)
                process = self._context.Process(
                    target=_rank, args=(theirs, self._device, rank, world, store.port, function, args)
                )
                process.start()
                theirs.close()
                started[ours] = (rank, process)
            return _collect(started, time.monotonic() + seconds)
        finally:
            for connection, (_, process) in started.items():
                process.kill()
                process.join()
                connection.close()


def _collect(started: dict[Connection, tuple[int, Any]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = set(started)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(started[one][0] for one in waiting)} did not finish in time")
        for connection in ready:
            rank, process = started[connection]
            try:
                failure, result = connection.recv()
            except EOFError:
                process.join()
                raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}") from None
            if failure:
                raise RuntimeError(f"rank {rank} failed:\n{failure}")
            results[rank] = result
            waiting.remove(connection)
    return [results[rank] for rank in range(len(started))]


def _rank(
    connection: Connection,
    device: str,
    rank: int,
    world: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported is nobody's garbage
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        if device == "cuda":
            place = torch.device("cuda", rank)
            torch.cuda.set_device(place)
            dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=world, device_id=place)
        else:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        connection.send((None, function(rank, *args)))
    except BaseException:
        connection.send((traceback.format_exc(), None))
