"""The DeepSpeed engine under the same loop: the same training run, and the same way back from a lost rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from command import JOB, Answer, Fivefold, kinds, metrics, numbers
from safetensors.numpy import load_file

from orchestrator.run_folder import RunFolder

LAYOUT = ("layout.tp=1", "layout.dp=4", "layout.ep=2", "layout.zero_stage=2")


def test_a_rank_is_killed_and_the_run_is_that_of_the_other_engine(
    fivefold: Fivefold, reference: dict[int, tuple[float, float]], undisturbed: tuple[Fivefold, Answer], tmp_path: Path
) -> None:
    answer = fivefold("run", JOB, "engine=deepspeed", *LAYOUT, "fault.kill_rank=1", "fault.at_step=7")

    assert answer.code == 0, answer.told
    assert answer.document["attempts"] == 2
    run = RunFolder(answer.document["run_folder"])
    assert "run_done" in kinds(run)
    found: dict[int, tuple[float, float]] = {}
    for line in metrics(run):
        assert found.setdefault(line["step"], numbers(line)) == numbers(line), "trained again to other bits"
    assert set(found) == set(reference)
    np.testing.assert_allclose([found[step] for step in reference], list(reference.values()), rtol=1e-4)
    log = run.read("logs/attempt-2/rank-0.log").decode().splitlines()
    assert all(line.startswith(("attempt 2:", "step ")) for line in log), log

    ours, theirs = exported(fivefold, answer, tmp_path / "ours"), exported(*undisturbed, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert np.linalg.norm(ours[name] - weight) <= 1e-4 * np.linalg.norm(weight), name

    # What DeepSpeed trained to step 12 goes on in Megatron.
    made = fivefold("checkpoint", "reshard", run.run_id, "--engine", "megatron", "--step", "12")
    assert made.code == 0, made.told
    assert fivefold("resume", made.document["run_id"]).code == 0
    gone_on = {line["step"]: numbers(line) for line in metrics(RunFolder(made.document["run_folder"]))}
    assert list(gone_on) == [13, 14, 15, 16]
    np.testing.assert_allclose(list(gone_on.values()), [reference[step] for step in gone_on], rtol=1e-4)


def exported(fivefold: Fivefold, answer: Answer, folder: Path) -> dict[str, np.ndarray]:
    """A run's last checkpoint in Hugging Face's form, tensors by name."""
    run = RunFolder(answer.document["run_folder"])
    made = fivefold("checkpoint", "export", run.run_id, "--format", "huggingface", "--to", str(folder))
    assert made.code == 0, made.told
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
