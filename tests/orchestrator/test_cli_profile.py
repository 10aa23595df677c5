"""`fivefold profile` as a user calls it, and plans made with what it wrote or with a device that has no profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Fivefold, refused

from parallel.estimates.hardware import WANTED, shipped_text


@pytest.mark.timeout(120)
def test_this_machine_is_measured_and_planned_with(fivefold: Fivefold, tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    answer = fivefold("profile", "--out", str(file), "--seconds", "1")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0].startswith("machine  ")
    assert "NOT MEASURED" not in answer.out
    found = json.loads(file.read_text())
    assert found["measured"]["failed"] == {}
    fields = {name: found[name] for name in WANTED}
    timed = [name for name, field in fields.items() if field["source"].startswith("measured on ")]
    assert set(timed) == {
        *("memory_bytes_per_second", "bf16_flops", "fp32_flops", "half_depth", "launch_seconds"),
        *("attention_forward_flops", "attention_backward_flops"),
        *("collective_seconds", "fast_link", "host_adam_bytes_per_second"),
    }
    # A core makes between a hundred million and a trillion FLOP/s.
    assert 1e8 < found["fp32_flops"]["value"] < 1e12
    told = [line.split()[0] for line in lines if "%" in line and not line.startswith("grouped")]
    assert set(told) <= {*timed, "fast_link.latency_seconds", "fast_link.bytes_per_second"}
    planned = fivefold("plan", "quickstart", f"cluster.hardware={file}", "--json").document
    shipped = fivefold("plan", "quickstart", "--json").document
    assert planned["cluster"]["hardware"] == str(file)
    assert planned["plans"][0]["step_seconds"] != shipped["plans"][0]["step_seconds"]


@pytest.mark.parametrize(
    ("arguments", "path", "nearest"),
    [
        (("--out", "here.yaml"), "--out", "here.json"),
        (("--out", "no/such/here.json"), "--out", None),
        (("--seconds", "soon"), "command line", None),
    ],
)
def test_what_cannot_be_asked(fivefold: Fivefold, arguments: Any, path: str, nearest: str | None) -> None:
    refused(fivefold("profile", *arguments, "--json"), path, nearest)


def test_a_device_without_a_profile_is_planned_as_the_nearest_and_that_is_said(fivefold: Fivefold) -> None:
    asked = ("plan", "llama3_8b", "cluster.hardware=h100_nvl")
    answer = fivefold(*asked)
    assert answer.code == 0
    assert answer.err.startswith("fivefold: h100_nvl HAS NO PROFILE: planned as if it were h100, the nearest")
    document = fivefold(*asked, "--json").document
    assert document["profile"] == "h100"
    assert f"fivefold: {document['notice']}\n" == answer.err
    own = fivefold("plan", "llama3_8b", "--json")
    assert (own.document["profile"], own.document["notice"], own.err) == ("h100", "", "")
    assert own.document["plans"] == document["plans"]


def test_a_profile_that_is_none(fivefold: Fivefold, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    given = json.loads(shipped_text("h100"))
    given["memory_bytes"]["value"], given["fast_link"]["value"], given["bf16_flops"]["value"] = "80GB", 9e11, 0
    file.write_text(json.dumps(given))
    said = refused(fivefold("plan", "llama3_8b", f"cluster.hardware={file}"), str(file))
    assert said.endswith(
        "memory_bytes.value='80GB' is not a number; bf16_flops.value=0 is not above 0; "
        "fast_link.value=900000000000.0 is not [seconds, bytes a second]"
    )
    refused(fivefold("plan", "llama3_8b", f"cluster.hardware={tmp_path / 'none.json'}"), "cluster.hardware")
