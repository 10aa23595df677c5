"""Checkpoints in a run folder: which are there, what is wrong with them, which are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from sample_runs import job, make_checkpoint, make_run, step_report

from jobs.architecture import ModelArchitecture
from jobs.errors import InputError
from jobs.spec import CheckpointSpec
from orchestrator import manifests
from orchestrator.run_folder import RunFolder


@pytest.fixture
def run(root: str) -> RunFolder:
    return make_run(f"{root}/quick-1")


def test_steps_are_those_with_a_manifest_newest_first(run: RunFolder) -> None:
    assert manifests.steps(run) == []
    for step in (5, 100, 20):
        make_checkpoint(run, step)
    run.write("checkpoints/step-00000200/model/part-0.bin", b"half written")
    run.write("checkpoints/step-later/manifest.json", b"{}")
    run.write("checkpoints/notes.txt", b"")
    assert manifests.steps(run) == [100, 20, 5]


def test_a_manifest_is_read_as_it_was_written(run: RunFolder) -> None:
    written = make_checkpoint(run, 20)
    assert manifests.read(run, 20) == written
    assert written.size_bytes == 2048 + len("step 20")


def test_a_manifest_keeps_a_loss_that_has_diverged(run: RunFolder) -> None:
    make_checkpoint(run, 20, reports=(step_report(20, loss=math.nan, grad_norm=math.inf),))
    (report,) = manifests.read(run, 20).reports
    assert math.isnan(report.loss)
    assert report.grad_norm == math.inf


def test_a_checkpoint_that_is_not_there_names_the_nearest(run: RunFolder) -> None:
    with pytest.raises(InputError) as caught:
        manifests.read(run, 7)
    assert (caught.value.path, caught.value.value, caught.value.nearest) == ("checkpoint", 7, None)
    for step in (5, 100):
        make_checkpoint(run, step)
    with pytest.raises(InputError) as caught:
        manifests.read(run, 7)
    assert caught.value.nearest == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda record: record | {"format": 3, "fivefold": "0.4.0"},
            "is of checkpoint format 3, which fivefold 0.4.0 wrote and reads; this version, 0.1.0, reads format 2",
        ),
        (lambda record: [], "is not a manifest"),
        (lambda record: record | {"step": 21}, "is the manifest of step 21"),
        (lambda record: record | {"data_cursor": 7}, "is not as it was written: its seal does not fit it"),
        (lambda record: record | {"files": [record["files"][0] | {"name": "../../job.json"}]}, "is not a manifest: "),
        (lambda record: record | {"files": [record["files"][0] | {"name": "/etc/passwd"}]}, "is not a manifest: "),
        (lambda record: record | {"mystery": 1}, "is not a manifest: Extra inputs are not permitted"),
        (lambda record: record | {"step": "x"}, "is not a manifest: Input should be a valid integer"),
    ],
)
def test_a_manifest_that_cannot_be_understood(run: RunFolder, change: Callable[[Any], Any], said: str) -> None:
    make_checkpoint(run, 20)
    name = "checkpoints/step-00000020/manifest.json"
    run.write(name, json.dumps(change(run.read_json(name))).encode())
    with pytest.raises(InputError) as caught:
        manifests.read(run, 20)
    assert str(caught.value).startswith(f"{run.path(name)}: {said}")


def test_a_manifest_cut_short_is_no_json(run: RunFolder) -> None:
    make_checkpoint(run, 20)
    name = "checkpoints/step-00000020/manifest.json"
    run.write(name, run.read(name)[:100])
    with pytest.raises(InputError, match="is not JSON"):
        manifests.read(run, 20)


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(run: RunFolder) -> None:
    manifest = make_checkpoint(run, 20)
    manifests.check_job(manifest, job("model.name=renamed"), run.place)
    with pytest.raises(InputError) as caught:
        manifests.check_job(manifest, job("model.layers=8", "model.experts=8"), run.place)
    assert caught.value.path == f"{run.place}/checkpoints/step-00000020"
    assert caught.value.rule == "is a checkpoint of another model: layers 4 there, 8 here, experts 4 there, 8 here"


def test_every_field_of_a_model_but_its_name_is_compared(run: RunFolder) -> None:
    manifest = make_checkpoint(run, 20)
    for field, value in manifest.model.model_dump().items():
        if field == "name":
            continue
        changed: Any = not value if isinstance(value, bool) else "sigmoid" if isinstance(value, str) else value + 1
        model = ModelArchitecture.model_construct(**(manifest.model.model_dump() | {field: changed}))
        other = job().model_copy(update={"model": model})
        with pytest.raises(InputError, match=f"another model: {field} "):
            manifests.check_job(manifest, other, run.place)


def test_a_checkpoint_of_the_other_engine_is_refused(run: RunFolder) -> None:
    manifest = make_checkpoint(run, 20)
    with pytest.raises(InputError, match="of the megatron engine, which the deepspeed engine does not read"):
        manifests.check_job(manifest, job("engine=deepspeed"), run.place)


# Damage.


def damages(run: RunFolder, step: int) -> list[str]:
    entries = manifests.read(run, step).files
    return [text for entry in entries if (text := manifests.damage(run, step, entry))]


def test_a_whole_checkpoint_has_no_damage(run: RunFolder) -> None:
    make_checkpoint(run, 20)
    assert damages(run, 20) == []


@pytest.mark.parametrize("at", [0, 1000, 2047])
def test_one_flipped_bit_is_found(run: RunFolder, at: int) -> None:
    make_checkpoint(run, 20)
    name = "checkpoints/step-00000020/model/part-0.bin"
    content = bytearray(run.read(name))
    content[at] ^= 1
    run.write(name, bytes(content))
    (text,) = damages(run, 20)
    assert text.startswith(f"{name} has SHA-256 ")
    assert text.endswith("was written")


def test_a_file_cut_short_or_grown_is_found_by_its_size(run: RunFolder) -> None:
    make_checkpoint(run, 20)
    name = "checkpoints/step-00000020/model/part-0.bin"
    content = run.read(name)
    for changed in (content[:-1], content + b"\0", b""):
        run.write(name, changed)
        assert damages(run, 20) == [f"{name} has {len(changed)} bytes, 2048 were written"]


def test_a_deleted_file_is_found(run: RunFolder) -> None:
    make_checkpoint(run, 20)
    run.remove("checkpoints/step-00000020/common.pt")
    assert damages(run, 20) == ["checkpoints/step-00000020/common.pt is missing"]


def test_a_digest_reads_files_longer_than_its_chunk(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(run, 20)
    monkeypatch.setattr(manifests, "_CHUNK_BYTES", 1000)
    assert damages(run, 20) == []


# Pruning.


def test_pruning_keeps_the_newest(run: RunFolder) -> None:
    for step in (20, 40, 60, 80):
        make_checkpoint(run, step)
    assert manifests.prune(run, CheckpointSpec(interval=20, keep=4)) == []
    assert manifests.prune(run, CheckpointSpec(interval=20, keep=2)) == [40, 20]
    assert run.names("checkpoints") == ["step-00000060", "step-00000080"]
    assert damages(run, 80) == []


def test_the_manifest_is_removed_first(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (20, 40):
        make_checkpoint(run, step)
    removed = []
    monkeypatch.setattr(RunFolder, "remove", lambda self, name: removed.append(name))
    manifests.prune(run, CheckpointSpec(interval=20, keep=1))
    assert removed == ["checkpoints/step-00000020/manifest.json", "checkpoints/step-00000020"]


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ({"keep": 1}, [60]),
        ({"keep": 2, "keep_every": 20}, [60, 50, 40, 20]),
        ({"keep": 1, "keep_best": 2}, [60, 40, 10]),
        ({"keep": 9}, [60, 50, 40, 30, 20, 10]),
    ],
)
def test_what_is_kept_is_new_or_regular_or_good(run: RunFolder, spec: dict[str, int], kept: list[int]) -> None:
    losses = {10: 2.0, 20: 3.0, 30: math.nan, 40: 1.0, 50: None, 60: 2.5}
    for step, loss in losses.items():
        make_checkpoint(run, step, reports=(step_report(step, validation_loss=loss),))
    manifests.prune(run, CheckpointSpec(interval=10, **spec))
    assert manifests.steps(run) == kept


def test_a_damaged_manifest_takes_no_good_ones_place(run: RunFolder) -> None:
    for step in (20, 40):
        make_checkpoint(run, step)
    run.write("checkpoints/step-00000040/manifest.json", b"{")
    assert manifests.prune(run, CheckpointSpec(interval=20, keep=1)) == []
    assert [manifest.step for manifest in manifests.whole(run)] == [20]
