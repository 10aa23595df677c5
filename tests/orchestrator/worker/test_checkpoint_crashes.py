"""Checkpoints that were interrupted: whatever change is the last, the newest whole state is resumed from."""

from __future__ import annotations

from crashes import attempts


def test_a_training_killed_or_refused_at_any_change_resumes_from_what_it_had() -> None:
    found = attempts(range(15))
    assert sum(found.values()) == 15
    assert {what.split(",")[0] for what in found} == {"killed", "refused"}
    assert {what.split(",")[1] for what in found} == {" uploading", " on a disk"}
