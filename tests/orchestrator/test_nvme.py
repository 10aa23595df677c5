"""Offload to NVMe is refused before anything starts where DeepSpeed cannot do it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jobs.errors import InputError
from jobs.spec import LayoutSpec
from orchestrator.nvme import check_nvme


def layout(folder: Path) -> LayoutSpec:
    return LayoutSpec(zero_stage=3, offload_optimizer="nvme", nvme_folder=str(folder))


@pytest.fixture
def deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation of DeepSpeed in which nothing is compiled."""
    package = tmp_path / "deepspeed"
    (package / "ops" / "aio").mkdir(parents=True)
    (package / "ops" / "pin_memory").mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    return package


def test_what_is_not_built_is_named(deepspeed: Path, tmp_path: Path) -> None:
    (deepspeed / "ops" / "pin_memory" / "pin_memory_op.cpython-311-x86_64-linux-gnu.so").touch()
    with pytest.raises(InputError) as caught:
        check_nvme(layout(tmp_path))
    assert str(caught.value).startswith("layout.offload_optimizer=nvme: async_io of DeepSpeed are not built")
    assert caught.value.nearest == "cpu"
    check_nvme(LayoutSpec(zero_stage=3, offload_optimizer="cpu"))


def test_where_it_is_built_the_folder_must_be_there(deepspeed: Path, tmp_path: Path) -> None:
    for library in ("aio/async_io_op.so", "pin_memory/pin_memory_op.so"):
        (deepspeed / "ops" / library).touch()
    check_nvme(layout(tmp_path))
    with pytest.raises(InputError, match=r"layout\.nvme_folder=.*nowhere: is no folder on this machine"):
        check_nvme(layout(tmp_path / "nowhere"))
