"""Rows of published measurements: one layout of one model on one cluster, and what was measured of it.

The schema is that of a CSV file whose first line names its columns; `COLUMNS` are those that must be there.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.architecture import ModelArchitecture
from jobs.errors import InputError
from parallel.layout import Layout
from parallel.workload import Load, Precision, Workload

MODEL_COLUMNS = (
    "layers",
    "hidden",
    "ffn",
    "heads",
    "kv_heads",
    "vocab",
    "experts",
    "topk",
    "moe_ffn",
    "shared_experts",
)
LAYOUT_COLUMNS = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")
COLUMNS = (
    *("row_id", "model", "arch", "seq_len", "gbs", "mbs", "gpus", "gpu_type", "gpus_per_node", "precision"),
    *MODEL_COLUMNS,
    *LAYOUT_COLUMNS,
    *("zero_stage", "sp", "recompute", "offload", "attn_kernel", "dispatcher", "routing", "framework"),
)


class UnpricedError(Exception):
    """A row that says too little, or tells of something that the planner does not know; the message says what."""


@dataclass(frozen=True)
class Row:
    """One line of the file; `cells` are its texts by column."""

    cells: dict[str, str]

    @property
    def row_id(self) -> str:
        return self.cells["row_id"]

    def number(self, column: str) -> float | None:
        """What was measured, or None where the cell is empty."""
        text = self.cells.get(column, "")
        return float(text) if text else None

    def workload(self, micro_batch: int | None = None) -> Workload:
        """The step that the row tells of, with `micro_batch` where the row leaves it open. May raise UnpricedError."""
        model, layout = self._model(), self._layout()
        batch, micro = self._count("gbs"), micro_batch or self._count("mbs")
        if batch % (layout.dp * micro):
            raise UnpricedError(f"dp*mbs={layout.dp}*{micro} does not divide gbs={batch}")
        sharding = self.cells["zero_stage"]
        stage = re.match(r"(?:fsdp\()?([0-3])", sharding.lower())
        replicas = 1
        if found := re.search(r"sharded in (?:(\d+)-GPU node|(\d+) ranks)", sharding):
            replicas = max(1, layout.dp // int(found[1] or found[2]))
        elif "HSDP" in sharding:
            replicas = max(1, layout.dp // self._count("gpus_per_node"))
        return Workload(
            model=model,
            layout=layout,
            sequence_length=self._count("seq_len"),
            global_batch=batch,
            micro_batch=micro,
            precision=self._precision(),
            devices_per_node=self._count("gpus_per_node"),
            recompute=self.recompute,
            fused_attention=self.cells["attn_kernel"] != "torch",
            dispatcher="flex" if self.cells["dispatcher"].startswith(("DeepEP", "HybridEP")) else "alltoall",
            load=self._load(),
            # Megatron-DeepSpeed without ZeRO keeps the whole state on every rank.
            zero_stage=int(stage[1]) if stage else 0,  # type: ignore[arg-type]
            optimizer_replicas=replicas,
            optimizer_offloaded=self._offloaded(),
        )

    @property
    def hardware(self) -> str:
        """The row's device, as it is called in the file."""
        return self.cells["gpu_type"]

    @property
    def recompute(self) -> frozenset[str]:
        """By modules; `{"layer"}` is whole layers. What is not said is taken for none."""
        text = self.cells["recompute"].removeprefix("selective").lstrip(": ")
        if text.startswith("full"):
            return frozenset({"layer"})
        if text in ("", "none") or text.startswith("unknown"):
            return frozenset()
        if text in ("layer", "op"):
            raise UnpricedError(
                f"recompute={self.cells['recompute']}: every other layer, or operations by torch's choice"
            )
        return frozenset(text.replace(" ", "").split(","))

    def _model(self) -> ModelArchitecture:
        cells, arch = self.cells, self.cells["arch"]
        if "mla" in arch or "hybrid" in arch or "sliding" in arch or not arch:
            raise UnpricedError(f"a model of kind '{arch or 'not said'}'")
        experts = self._count("experts", 0)
        try:
            return ModelArchitecture(
                name=cells["model"],
                layers=self._count("layers"),
                hidden=self._count("hidden"),
                heads=self._count("heads"),
                kv_heads=self._count("kv_heads"),
                head_dim=128 if "qwen3" in cells["model"] else self._count("hidden") // self._count("heads"),
                ffn=self._count("ffn", 0 if experts else None),
                gated="gelu" not in arch,
                vocab=self._count("vocab"),
                experts=experts,
                top_k=self._count("topk", 0),
                expert_ffn=self._count("moe_ffn", 0),
                shared_expert_ffn=self._count("shared_experts", 0) * self._count("moe_ffn", 0),
                capacity_factor=1.0 if "token-drop" in cells["routing"] else 0.0,
            )
        except ValueError as error:
            raise UnpricedError(str(error)) from None

    def _layout(self) -> Layout:
        degrees: dict[str, Any] = {
            axis: self._count(axis, None if axis in ("tp", "pp", "dp") else 1) for axis in LAYOUT_COLUMNS
        }
        try:
            layout = Layout(**degrees, sp=False if self.cells["sp"] == "no" else None)
        except InputError as error:
            raise UnpricedError(str(error)) from None
        if layout.world != self._count("gpus"):
            raise UnpricedError(f"tp*cp*dp*pp={layout.world} is not gpus={self.cells['gpus']}")
        return layout

    def _precision(self) -> Precision:
        text = self.cells["precision"].lower()
        if "nvfp4" in text:
            raise UnpricedError("products in four bits")
        if "fp8" in text:
            return "fp8"
        return "fp16" if "fp16" in text and "bf16" not in text else "bf16"

    def _load(self) -> Load:
        return "balanced" if "force" in self.cells["routing"] or "drop" in self.cells["routing"] else "natural"

    def _offloaded(self) -> float:
        """Share of the optimizer that is the host's."""
        if found := re.match(r"optimizer (\d+)%", self.cells["offload"]):
            return int(found[1]) / 100
        return 1.0 if self.cells["offload"].startswith("optimizer to CPU") else 0.0

    def _count(self, column: str, default: int | None = None) -> int:
        text = self.cells[column]
        if not text and default is None:
            raise UnpricedError(f"{column} is not published")
        return int(float(text)) if text else default or 0


def read(path: Path) -> Iterator[Row]:
    """The rows of a file. InputError where it is no such file, or lacks columns: all of them named."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (lines.fieldnames or ())]
            if missing:
                raise InputError(str(path), None, f"lacks the columns {', '.join(missing)}")
            for cells in lines:
                yield Row({column: (text or "").strip() for column, text in cells.items() if column})
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), None, f"cannot be read: {error}") from None
