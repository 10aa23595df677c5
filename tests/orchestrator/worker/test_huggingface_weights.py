"""A Hugging Face folder into an engine at some layout, and out of it or its checkpoint, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from families import FAMILIES, random_weights
from sample_runs import make_checkpoint, make_run

from jobs.spec import CheckpointSpec, ClusterSpec, DataSpec, JobSpec, LayoutSpec, PolicySpec, TrainSpec
from jobs.tensors import tensors
from models.huggingface import source, write
from models.weights import whole
from orchestrator.files import Files
from orchestrator.manifests import FileEntry, folder_name
from orchestrator.worker.checkpoint_tensors import Writer
from orchestrator.worker.checkpoint_weights import read_megatron
from orchestrator.worker.engines.megatron import build
from orchestrator.worker.export import export
from orchestrator.worker.ranks import Ranks
from parallel.layout import Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def job(family: str, precision: str) -> JobSpec:
    return JobSpec(
        name=family,
        model=FAMILIES[family],
        data=DataSpec(files=("unused",)),
        cluster=ClusterSpec(name="test", device="cpu", hardware="laptop", devices_per_node=8),
        layout=LayoutSpec(),
        train=TrainSpec(steps=1, sequence_length=16, global_batch=8, precision=precision, learning_rate=1e-2),
        checkpoint=CheckpointSpec(interval=1),
        policy=PolicySpec(),
    )


def through_an_engine(rank: int, spec: JobSpec, layout: Layout, weights: str, saved: Path, written: Path) -> None:
    """Read `weights` into an engine, save a checkpoint, and write what the engine gives to another folder."""
    engine = build(spec, layout, torch.device("cpu"))
    engine.set_weights(source(weights, spec.model))
    engine.save(saved)
    gathered: list[Any] = [None] * layout.world
    dist.all_gather_object(gathered, list(engine.weights()))
    if rank == 0:
        found = {name: torch.full(shape, torch.nan) for name, shape in tensors(spec.model).items()}
        for shard in (shard for shards in gathered for shard in shards):
            shard.cut(found[shard.name]).copy_(shard.part)
        list(write(written, spec.model, found.__getitem__, DTYPES[spec.train.precision], 16))


@pytest.mark.parametrize(
    ("family", "layout", "precision"),
    [
        ("llama", Layout(tp=2, etp=2), "fp32"),
        ("qwen3", Layout(tp=2, pp=2, etp=2), "bf16"),
        ("mixtral", Layout(), "bf16"),
        ("mixtral", Layout(dp=2, ep=2, etp=1), "fp32"),
        ("qwen2_moe", Layout(tp=2, pp=2, ep=2), "fp32"),
        ("qwen3_moe", Layout(tp=2, pp=2, dp=1, ep=1, etp=2), "bf16"),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_weights_come_out_as_they_went_in(
    ranks: Ranks, tmp_path: Path, family: str, layout: Layout, precision: str
) -> None:
    spec = job(family, precision)
    model, dtype = spec.model, DTYPES[precision]
    weights = random_weights(model, dtype)
    given, saved, written, exported = (tmp_path / name for name in ("given", "saved", "written", "exported"))
    for folder in (given, saved, written, exported):
        folder.mkdir()
    list(write(given, model, weights.__getitem__, dtype, 16))
    ranks.run(layout.world, through_an_engine, spec, layout, str(given), saved, written)
    assert _bytes(written) == _bytes(given)
    list(write(exported, model, read_megatron(saved, model), dtype, 16))
    assert _bytes(exported) == _bytes(given)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_fp32_weights_are_rounded_once_wherever_the_checkpoint_lies(root: str, tmp_path: Path) -> None:
    """A checkpoint as the deepspeed engine writes it, on a disk and at an object store."""
    spec = job("mixtral", "bf16")
    weights = random_weights(spec.model)
    kinds = {"weight": 0, "first_moment": 1}
    tensors_of = {f"{kind}.{name}": tensor + add for kind, add in kinds.items() for name, tensor in weights.items()}
    (tmp_path / "saved").mkdir()
    torch_checkpoint.save(tensors_of, storage_writer=Writer(Files(tmp_path / "saved"), {}), no_dist=True)
    run = make_run(f"{root}/tuned-1", spec)
    files = []
    for path in (tmp_path / "saved").iterdir():
        run.write(f"{folder_name(1)}/{path.name}", path.read_bytes())
        files.append(FileEntry(name=path.name, size_bytes=path.stat().st_size, sha256=""))
    make_checkpoint(run, 1, spec, engine="deepspeed", files=tuple(files))
    (tmp_path / "out").mkdir()
    export(run, 1, tmp_path / "out")
    found = source(str(tmp_path / "out"), spec.model)
    for name, tensor in weights.items():
        assert torch.equal(found(whole(name, tensor)), tensor.bfloat16()), name
