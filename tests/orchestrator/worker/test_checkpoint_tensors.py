"""Nothing that is read from a checkpoint is executed, and no name in one leads out of its folder."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from crashes import Tensors, _Planner

from jobs.errors import InputError
from orchestrator.worker.checkpoint_tensors import NAME, read


class Malicious:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._trace),)


def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    Tensors(1).save(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Malicious(trace)))  # what torch's own reader would load
    tensors = Tensors(2)
    tensors.load(tmp_path)
    assert tensors.equals(Tensors(1))

    value = io.BytesIO()
    torch.save(Malicious(trace), value)
    value.seek(0)
    planner = _Planner()
    planner.set_up_planner({"steps": 0}, torch_checkpoint.Metadata({}), True)
    with pytest.raises(pickle.UnpicklingError):
        planner.load_bytes(SimpleNamespace(dest_index=SimpleNamespace(fqn="steps")), value)  # type: ignore[arg-type]
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "a/../../b", ""])
def test_a_tensor_lies_in_its_folder(tmp_path: Path, name: str) -> None:
    Tensors(1).save(tmp_path)
    record = json.loads((tmp_path / NAME).read_text())
    record["tensors"]["weight"]["chunks"][0][2] = name
    (tmp_path / NAME).write_text(json.dumps(record))
    with pytest.raises(InputError, match="is not the name of a file in its folder"):
        read(tmp_path)
