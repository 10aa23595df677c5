"""Weights in and out, from the command line: what is refused, before anything is created."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Fivefold, contents, refused
from sample_runs import job, make_checkpoint, make_run

from jobs.spec import JobSpec
from models.huggingface_names import config
from orchestrator import manifests
from orchestrator.run_folder import RunFolder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder that says it is quickstart's model, and has no tensor."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(job().model, "float32", 128)))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


@pytest.mark.parametrize("verb", ["plan", "run", "submit"])
def test_a_folder_of_other_weights_is_refused(fivefold: Fivefold, run_root: Path, weights: Path, verb: str) -> None:
    answer = fivefold(verb, "quickstart", f"init_from={weights}", "--json")
    said = refused(answer, "init_from")
    assert "tensors missing (79 of the model's 79): model.embed_tokens.weight, " in said
    assert said.endswith(" and 69 more")
    assert not run_root.exists()


def test_a_folder_that_is_not_here_is_the_ranks_to_check(fivefold: Fivefold, run_root: Path, weights: Path) -> None:
    misspelt = weights.with_name("weigths")
    refused(fivefold("run", "quickstart", f"init_from={misspelt}", "--json"), "init_from", weights)
    planned = fivefold("plan", "quickstart", f"init_from={misspelt}")
    assert planned.code == 0
    assert planned.err == f"init_from={misspelt}: is not on this machine; the ranks will check it\n"
    refused(fivefold("plan", "quickstart", "init_from=s3://bucket/weights", "--json"), "init_from", "a local path")
    assert not run_root.exists()


def test_a_run_keeps_the_weights_that_it_began_with(fivefold: Fivefold, run: RunFolder, weights: Path) -> None:
    before = contents(Path(run.place))
    refused(fivefold("resume", run.run_id, f"init_from={weights}", "--json"), "init_from")
    assert contents(Path(run.place)) == before


def test_a_run_without_a_checkpoint_begins_again_from_its_folder(
    fivefold: Fivefold, run_root: Path, weights: Path
) -> None:
    spec = JobSpec.model_validate(job().model_dump() | {"init_from": str(weights)})
    made = make_run(str(run_root / "tuned-1"), spec, state="interrupted", step=0)
    refused(fivefold("resume", made.run_id, "--json"), "init_from")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "exported"


def export(fivefold: Fivefold, target: Path, *more: str) -> object:
    return fivefold("checkpoint", "export", "quick-1", "--to", str(target), "--json", *more)


@pytest.mark.parametrize(
    ("arguments", "path", "nearest"),
    [
        (["--format", "hugingface"], "--format", "huggingface"),
        (["--format", "onnx"], "--format", "huggingface"),
        (["--step", "30"], "checkpoint", 40),
        (["--step", "0"], "command line", None),
    ],
)
def test_an_export_that_cannot_be_is_refused(
    fivefold: Fivefold, run: RunFolder, target: Path, arguments: list[str], path: str, nearest: object
) -> None:
    refused(export(fivefold, target, *arguments), path, nearest)
    assert not target.exists()


def test_a_folder_with_something_in_it_is_left_alone(fivefold: Fivefold, run: RunFolder, target: Path) -> None:
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    refused(export(fivefold, target), "--to", f"{target}-2")
    refused(export(fivefold, target / "notes.txt"), "--to", f"{target}/notes.txt-2")
    assert contents(target.parent / "exported") == {str(target / "notes.txt"): b"mine"}


def test_a_damaged_checkpoint_is_refused_by_name(fivefold: Fivefold, run: RunFolder, target: Path) -> None:
    name = f"{manifests.folder_name(40)}/common.pt"
    run.write(name, b"step 4O")
    said = refused(export(fivefold, target, "--step", "40"), "checkpoint", 20)
    assert f"checkpoint=40: is damaged: {name} has SHA-256 " in said
    run.remove(f"{manifests.folder_name(20)}/common.pt")
    refused(export(fivefold, target, "--step", "40"), "checkpoint")
    answer = export(fivefold, target)
    assert answer.code == 2
    assert answer.err.splitlines()[-1] == "fivefold: checkpoint=40, 20: none of them is whole"
    assert not target.exists()


def test_a_model_without_a_hugging_face_form_is_refused(fivefold: Fivefold, run_root: Path, target: Path) -> None:
    scaled = job().model.model_copy(update={"router_scale": 2.5})
    run = make_run(str(run_root / "quick-1"))
    make_checkpoint(run, 10, model=scaled)
    refused(export(fivefold, target), "model.router_scale", 1.0)
    empty = make_run(str(run_root / "quick-2"))
    refused(fivefold("checkpoint", "export", empty.run_id, "--json"), "checkpoint")


def test_nothing_is_left_of_an_export_that_fails(fivefold: Fivefold, run: RunFolder, target: Path) -> None:
    """The checkpoint is whole, as far as its hashes say, and is none."""
    run.remove(f"{manifests.folder_name(40)}/common.pt")
    answer = export(fivefold, target)
    assert answer.code == 3
    left_aside, failed = answer.err.splitlines()
    assert left_aside.startswith("checkpoint at step 40 is damaged and left aside: ")
    assert failed == "fivefold: nothing was exported: the writer ended with exit code 1"
    assert answer.document == {"error": failed.removeprefix("fivefold: ")}
    assert list(target.parent.glob("exported*")) == []
