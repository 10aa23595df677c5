"""What is said where kernels cannot be compiled."""

import pytest

from kernels import choice


def test_a_gpu_without_a_compiler_is_told_of_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    choice._compiles.cache_clear()
    with pytest.warns(UserWarning, match="no kernels without a C compiler") as told:
        assert [choice._compiles() for _ in range(2)] == [False, False]
    assert len(told) == 1
    monkeypatch.setenv("CC", "cc")
    choice._compiles.cache_clear()
    assert choice._compiles()
    choice._compiles.cache_clear()
