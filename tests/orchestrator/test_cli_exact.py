"""`fivefold exact` as a user calls it: two shipped jobs, small, on ranks of this machine."""

from __future__ import annotations

import json

import pytest
from commands import Fivefold


@pytest.mark.timeout(180)
def test_a_shipped_job_on_its_own_cluster_in_text(fivefold: Fivefold) -> None:
    answer = fivefold("exact", "quickstart", "layout.tp=2", "layout.ep=2", "cluster.devices_per_node=2")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0] == "job     quickstart by megatron at tp2 ep2"
    assert lines[1].startswith("shrunk  model: hidden 128 -> 32, head_dim 32 -> 4, vocab 264 -> 64")
    assert lines[2].split() == ["layout:", *lines[2].split()[1:]]
    steps = [line.split() for line in lines if line.split() and line.split()[0].isdigit()]
    assert [int(step[0]) for step in steps] == list(range(1, 21))
    for _, loss, expected, _, _ in steps:
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    verdicts = [line for line in lines if " exact " in f"{line} "]
    assert [line.split("  ")[0] for line in verdicts[:3]] == [
        "loss of a step",
        "gradient norm of a step",
        "a final weight's tensor",
    ]
    assert lines[-1] == "exact: quickstart, made small, at tp2 ep2 trains as on one device"


@pytest.mark.timeout(180)
def test_a_layout_of_64_gpus_on_this_machine_in_json(fivefold: Fivefold) -> None:
    fixed = ("layout.tp=4", "layout.pp=1", "layout.cp=1", "layout.ep=8", "layout.etp=1")
    answer = fivefold("exact", "qwen3_30b_a3b", "cluster.nodes=8", *fixed, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["exact"] is True
    assert found["losses"]["largest"] <= found["losses"]["bar"] == 1e-5
    assert found["weights"]["largest"] <= found["weights"]["bar"] == 1e-4
    assert found["changes"]["layout.dp"] == {"before": 16, "after": 2}
    assert found["changes"]["model.experts"]["before"] == 128


def test_what_no_engine_trains_is_refused_as_planning_refuses_it(fivefold: Fivefold) -> None:
    refused, planned = (fivefold(verb, "deepseek_v3") for verb in ("exact", "plan"))
    assert refused.code == planned.code == 2
    assert refused.err == planned.err
    assert "multi-latent attention" in refused.err
