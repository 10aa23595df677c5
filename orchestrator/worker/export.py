"""Writes a checkpoint's weights as a Hugging Face folder: `python -m orchestrator.worker.export RUN STEP FOLDER`.

Called by `fivefold checkpoint export`, which has checked all three; a process of its own, as the command line has no
torch. Says on stderr what it has written.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError

from jobs.spec import JobSpec
from models.huggingface import write
from orchestrator import manifests
from orchestrator.manifests import CheckpointManifest
from orchestrator.run_folder import RunFolder
from orchestrator.worker.checkpoint_weights import READERS


def export(run: RunFolder, step: int, folder: Path) -> None:
    """Write into the existing, empty `folder`, in the precision of training.

    In bf16 each weight is the optimizer's fp32 one, rounded once. Memory: the tensors of one file, at most 5 GB. A
    checkpoint on an object store is staged on this machine's disk.
    """
    job = JobSpec.model_validate(run.read_json("job.json"))
    dtype = torch.bfloat16 if job.train.precision == "bf16" else torch.float32
    manifest = manifests.read(run, step)
    with ExitStack() as stack:
        checkpoint = on_disk(run, manifest, stack)
        read = READERS[manifest.engine](checkpoint, manifest.model)
        for file in write(folder, manifest.model, read, dtype, job.train.sequence_length):
            print(f"wrote {file.name}, {file.stat().st_size:,} bytes", file=sys.stderr, flush=True)


def on_disk(run: RunFolder, manifest: CheckpointManifest, stack: ExitStack) -> Path:
    """A checkpoint's folder on this machine, until the stack is closed."""
    name = manifests.folder_name(manifest.step)
    if run.local is not None:
        return run.local / name
    staged = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fivefold-export-")))
    for entry in manifest.files:
        run.download(f"{name}/{entry.name}", staged / entry.name)
    return staged


if __name__ == "__main__":
    try:
        export(RunFolder(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    except (OSError, SafetensorError) as error:
        sys.exit(f"cannot go on: {error}")
