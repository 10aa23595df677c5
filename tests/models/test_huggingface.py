"""Hugging Face folders: what is refused, by the byte, the field or the tensor, and what is written and read."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, random_weights
from safetensors.torch import load_file, save_file

from jobs.errors import InputError
from jobs.tensors import tensors
from models.huggingface import source, write
from models.huggingface_folder import check
from models.weights import Shard

MODEL = FAMILIES["mixtral"]
WEIGHTS = random_weights(MODEL)
FILE_BYTES = 20_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in several files."""
    made = tmp_path / "weights"
    made.mkdir()
    list(write(made, MODEL, WEIGHTS.__getitem__, torch.float32, 16, FILE_BYTES))
    return made


def file(folder: Path, number: int = 2) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number - 1]


def refusals(folder: Path | str) -> list[str]:
    with pytest.raises(InputError) as refusal:
        check(str(folder), MODEL)
    return str(refusal.value).splitlines()


def test_files_are_filled_to_their_limit_and_the_index_tells_of_them(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 5
    held = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in files]
    assert max(held) <= FILE_BYTES
    assert all(one + other > FILE_BYTES for one, other in itertools.pairwise(held))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(held) == 4 * MODEL.parameters
    assert set(index["weight_map"].values()) == {path.name for path in files}


def test_only_a_rank_s_block_is_read(folder: Path) -> None:
    read = source(str(folder), MODEL)
    name, shape = "layers.1.moe.experts.3.down.weight", (32, 24)
    shard = Shard(name, shape, (8, 6), (16, 12), torch.empty(16, 12))
    assert torch.equal(read(shard), WEIGHTS[name][8:24, 6:18])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_are_rounded_once_to_the_precision_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    (file, config) = write(tmp_path, MODEL, WEIGHTS.__getitem__, dtype, 16)
    assert (file.name, config.name) == ("model.safetensors", "config.json")
    assert file.stat().st_mode == config.stat().st_mode
    assert torch.equal(load_file(file)["lm_head.weight"], WEIGHTS["head.weight"].to(dtype))
    assert json.loads(config.read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    entries = check(str(tmp_path), MODEL)
    assert {entry.dtype for entry in entries.values()} == {"BF16" if dtype == torch.bfloat16 else "F32"}


def test_tensors_missing_extra_misshapen_and_quantised_are_all_named(folder: Path) -> None:
    held = load_file(file(folder, 1))
    gone, bent = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"
    quantised = "model.layers.0.self_attn.q_proj.weight"
    del held[gone]
    held[bent] = held[bent][:, :-1].contiguous()
    held[quantised] = held[quantised].to(torch.int8)
    held["model.layers.9.surplus"] = torch.zeros(3)
    save_file(held, file(folder, 1))
    count = len(tensors(MODEL))
    assert refusals(folder) == [
        f"init_from={folder}: tensors missing (1 of the model's {count}): {gone}",
        f"init_from={folder}: tensors extra (1): model.layers.9.surplus",
        f"init_from={folder}: tensors misshapen (1): {bent} [64, 31] for [64, 32]",
        f"init_from={folder}: tensors of a precision not among F64, F32, F16, BF16 (1): {quantised} I8",
    ]


def test_hundreds_of_tensors_are_counted(folder: Path) -> None:
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    missing, extra = refusals(folder)
    assert missing.count("model.layers.") == 9  # of the ten that are named, one is the embedding
    assert missing.endswith(f" and {len(tensors(MODEL)) - 10} more")
    assert extra.endswith(": other")


def _cut(size: int) -> Callable[[Path], None]:
    return lambda folder: file(folder).write_bytes(file(folder).read_bytes()[:size])


def _header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = file(folder).read_bytes()
        length = int.from_bytes(content[:8], "little")
        file(folder).write_bytes(content[:8] + change(content[8 : 8 + length]) + content[8 + length :])

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut(5), r"ends at byte 5, within the first 8 bytes, the length of its header"),
        (_cut(100), r"ends at byte 100, within its header, to byte \d{3,4}"),
        (_cut(10_000), r"ends at byte 10000, its tensors at byte \d{5}"),
        (lambda folder: file(folder).open("ab").write(b"more"), r"ends at byte (\d+), its tensors at byte \d+"),
        (_header(lambda header: b"?" + header[1:]), r"bytes 8 to \d+ are no safetensors header: .*"),
        (_header(lambda header: header.replace(b"[0,", b"[9,")), r".* is said to take bytes \d+ to \d+; .* ends at .*"),
        (lambda folder: file(folder).unlink(), r"cannot be read: No such file or directory"),
    ],
    ids=["length", "header", "tensors", "tail", "json", "offsets", "gone"],
)
def test_a_damaged_file_is_named_with_the_byte(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    damaged = file(folder)
    damage(folder)
    (refusal,) = refusals(folder)
    assert re.fullmatch(f"{re.escape(str(damaged))}: {said}", refusal), refusal


def test_damage_and_another_model_are_told_together(folder: Path) -> None:
    _cut(100)(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 65, "num_hidden_layers": 3}))
    layers, vocab, damaged = refusals(folder)
    assert layers == f"model.layers=2: is 3 in {config}; nearest valid: 3"
    assert vocab == f"model.vocab=64: is 65 in {config}; nearest valid: 65"
    assert "ends at byte 100" in damaged


def test_a_folder_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    assert refusals(tmp_path / "weigths") == [f"init_from={tmp_path}/weigths: is not a folder; nearest valid: {folder}"]
    (tmp_path / "empty").mkdir()
    nothing = refusals(tmp_path / "empty")
    assert nothing == [
        f"{tmp_path}/empty/config.json: cannot be read: No such file or directory",
        f"init_from={tmp_path}/empty: has neither model.safetensors.index.json nor model.safetensors",
    ]
    assert "on a disk that every node sees" in refusals("s3://bucket/mixtral")[0]
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert refusals(folder) == [f"{folder}/model.safetensors.index.json: has no weight_map of tensors to files"]
    (folder / "config.json").write_text("{")
    assert "config.json: is not JSON" in refusals(folder)[0]
