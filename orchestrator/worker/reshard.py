"""Writes a checkpoint for another engine: `python -m orchestrator.worker.reshard RUN STEP NEW_RUN`.

Called by `fivefold checkpoint reshard`, which has made the new run's folder and checked the rest. One rank holds all of
the model and of its optimizer's state, in main memory: 16 bytes a parameter and what is read of a tensor at a time.
"""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack

import torch

from jobs.spec import JobSpec
from orchestrator import manifests
from orchestrator.messages import RankLaunch
from orchestrator.run_folder import RunFolder
from orchestrator.worker.checkpoint import Checkpoints
from orchestrator.worker.checkpoint_weights import state_in
from orchestrator.worker.export import on_disk
from orchestrator.worker.main import import_engine
from orchestrator.worker.reporter import Reporter
from parallel.layout import Layout

_ALONE = dict.fromkeys(("tp", "cp", "pp", "vpp", "dp", "ep", "etp", "micro_batch"), 1)
_PLAIN = {"recompute": "none", "offload_optimizer": "none", "offload_parameters": "none", "optimizer_replicas": 1}


def reshard(run: RunFolder, step: int, new: RunFolder) -> None:
    """Write the state of `step` as the first checkpoint of the run folder `new`, whose job names the engine."""
    manifest = manifests.read(run, step)
    job = JobSpec.model_validate(new.read_json("job.json"))
    alone = job.model_copy(
        update={
            "cluster": job.cluster.model_copy(update={"device": "cpu"}),
            "layout": job.layout.model_copy(update=_ALONE | _PLAIN),
        }
    )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    engine = import_engine(job.engine, "cpu").build(alone, Layout(), torch.device("cpu"))
    with ExitStack() as stack:
        engine.adopt(state_in(on_disk(run, manifest, stack), manifest.engine, manifest.model), step)
    told, unheard = socket.socketpair()
    launch = RankLaunch(
        run_id=new.run_id,
        attempt=0,
        rank=0,
        local_rank=0,
        store_address="",
        store_port=0,
        run_folder=new.place,
        job=alone,
        checkpoint_steps=(),
    )
    with told, unheard:
        Checkpoints(launch, Layout(), Reporter(launch, told.detach())).save(engine, step, ())


if __name__ == "__main__":
    try:
        reshard(RunFolder(sys.argv[1]), int(sys.argv[2]), RunFolder(sys.argv[3]))
    except OSError as error:
        sys.exit(f"cannot go on: {error}")
