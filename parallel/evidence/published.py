"""Rows of published measurements: one layout of one model on one cluster, and what was measured of it.

The schema is that of a CSV file whose first line names its columns; `COLUMNS` are those that must be there.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jobs.architecture import ModelArchitecture
from jobs.errors import InputError
from parallel.estimates.hardware import Hardware, Link, hardware
from parallel.estimates.loads import Load
from parallel.estimates.software import OURS
from parallel.estimates.workload import AttentionKernel, Loss, Precision, Workload
from parallel.layout import Layout

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
PROFILES = {
    "A100-80GB-SXM": "a100_80gb",
    "A800-80GB": "a100_80gb",
    "A100-40GB-SXM": "a100_40gb",
    "H100-80GB-SXM": "h100",
    "H200": "h200",
    "B200-180GB": "b200",
    "GB200 (NVL72)": "gb200_nvl72",
    "B300": "b300",
    "GB300 (NVL72)": "gb300_nvl72",
}
"""Of devices, as the file calls them."""

LAYOUT_COLUMNS = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")
COLUMNS = (
    *("row_id", "model", "arch", "seq_len", "gbs", "mbs", "gpus", "gpu_type", "gpus_per_node", "precision"),
    *MODEL_COLUMNS,
    *LAYOUT_COLUMNS,
    *("zero_stage", "sp", "recompute", "offload", "attn_kernel", "dispatcher", "routing", "framework"),
)

_LATENT: dict[str, Any] = {"kv_lora_rank": 512, "rope_head_dim": 64, "value_head_dim": 128, "first_dense_layers": 1}
MULTI_LATENT = {
    "deepseekv2": _LATENT | {"q_lora_rank": 1536},
    "deepseek-v2": _LATENT | {"q_lora_rank": 1536},
    "deepseekv3-4layers": _LATENT | {"q_lora_rank": 1536},
    "deepseek-v3": _LATENT | {"q_lora_rank": 1536, "first_dense_layers": 3},
    "kimi-k2": _LATENT | {"q_lora_rank": 1536},
    "moonlight": _LATENT,
}
"""Of multi-latent attention, by the beginning of a model's name: arXiv 2405.04434, 2412.19437, 2507.20534, 2502.16982
with their config.json; SimuMax's DeepSeek-V3 of 4 layers has one dense layer, by its published memory."""


FLEXIBLE = {"deepseek-v3": "", "kimi-k2": "", "qwen3-235b": "GB"}
"""Models whose recipes in Megatron-Bridge dispatch by DeepEP or HybridEP (scripts/performance/configs at 0426418), by
the beginning of their name, and of the devices that they do so on."""

LOSSES: dict[str, Loss] = {
    # Its head gathers logits over tensor-parallel ranks, and its loss casts them to fp32 for torch's cross_entropy
    # (github.com/Aleph-Alpha/scaling, lm_head.py and cross_entropy.py).
    "AA-Scaling": "whole",
    # FlashAttention's cross entropy is the default of MPT's loss_fn (github.com/mosaicml/llm-foundry, modeling_mpt.py).
    "Composer/FSDP": "fused",
}

COPIES = {"AA-Scaling": 1, OURS: 2}
"""Workload.activation_copies: AA-Scaling's SwiGLU (its mlp.py) and this repository's engine, when it was measured, fuse
nothing."""


class UnpricedError(Exception):
    """A row that says too little, or tells of something that the planner does not know; the message says what."""


@dataclass(frozen=True)
class Row:
    """One line of the file; `cells` are its texts by column."""

    cells: dict[str, str]

    @property
    def row_id(self) -> str:
        return self.cells["row_id"]

    @property
    def source(self) -> tuple[str, str]:
        """Who measured it, and the part of the table that it belongs to, where these are said."""
        return self.cells.get("source_id", "-"), self.cells.get("split", "-")

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
            recompute=self.recompute or frozenset(),
            attention_kernel=self._attention_kernel(),
            fused_norm=not self.software.startswith("AA-Scaling") or "RMS" in self.cells["attn_kernel"],
            activation_copies=COPIES.get(self.software, 0),
            loss=LOSSES.get(self.software, "parallel"),
            software=self.software,
            dispatcher="flex" if self._flexible else "alltoall",
            experts_overlap=bool(re.search(r"overlap on|overlap_1f1b=True", self.cells.get("notes", ""))),
            load=self._load(),
            # Megatron-DeepSpeed without ZeRO keeps the whole state on every rank; NVIDIA's recipes shard it.
            zero_stage=int(stage[1])
            if stage
            else int(self.software.startswith("Megatron-") and self.software != "Megatron-DeepSpeed"),  # type: ignore[arg-type]
            optimizer_replicas=replicas,
            # DeepSpeed's fp16 without ZeRO reduces gradients as they are. AA-Scaling does so too: with 13 billion
            # parameters whole on a rank, 4 bytes and the weights would be all of its 80 GB, and such steps ran.
            # Megatron-Bridge's recipes set grad_reduce_in_fp32=False.
            gradient_bytes=2 if self.software in ("Megatron-DeepSpeed", "AA-Scaling") or self._bridge else 4,
            # And of models with latent attention keep Adam's moments in bf16 (its recipes' exp_avg_dtype).
            moment_bytes=2 if self._bridge and model.is_multi_latent else 4,
            optimizer_offloaded=self._offloaded(),
        )

    @property
    def device(self) -> Hardware:
        """The profile of the row's device, or the nearest one's. UnpricedError where nothing is known of it."""
        name = self.cells["gpu_type"]
        try:
            found = hardware(PROFILES.get(name, name), self._count("gpus_per_node"))
        except InputError:
            raise UnpricedError(f"no profile of {name or 'a device that is not said'}") from None
        ports = re.search(r"inter-node (\d+) Gb/s", self.cells.get("inferred_fields", ""))
        if ports is None:
            return found
        # Of what ports carry, 85% is reached, as on H100s (all-to-all of 470 MB, arXiv 2603.07685).
        return _with_ports(found, 0.85 * int(ports[1]) * 1e9 / 8 / self._count("gpus_per_node"))

    @property
    def step_seconds(self) -> float | None:
        """As measured, or as follows from measured tokens a second; None where the row has neither."""
        seconds, tokens = self.number("iter_time_s"), self.number("tokens_s_gpu")
        if seconds or not tokens or not self.cells["gbs"] or not self.cells["seq_len"]:
            return seconds
        return self._count("gbs") * self._count("seq_len") / (tokens * self._count("gpus"))

    @property
    def ran_out(self) -> bool | None:
        """Of memory; None where the row does not say whether it ran."""
        status = self.cells.get("status", "")
        return True if status.startswith("oom") else False if status.startswith("ok") else None

    @property
    def tflops(self) -> float | None:
        """As measured, a device's; from the share of its peak where only that is given."""
        share = self.number("mfu_pct")
        peak = self.device.peak_bf16_flops
        return self.number("tflops_gpu") or (share / 100 * peak / 1e12 if share and peak else None)

    def flops_per_token(self, step: Workload) -> float:
        """By the row's convention: Megatron-Core's formula counted attention whole until 0.9.

        Megatron-Bridge's rows, whose tokens a second are known, agree with the causal half.
        """
        flops = float(step.model.flops_per_token(step.sequence_length))
        if self.software in ("Megatron-Core r0.8.0", "Megatron-Core", "InternEvo") and not self.number("tokens_s_gpu"):
            flops += step.model.layers * 6.0 * step.sequence_length * step.model.heads * step.model.head_dim
        if self.cells.get("tflops_kind", "").startswith("hardware") and step.recompute == {"layer"}:
            flops *= 4 / 3
        return flops

    @property
    def _bridge(self) -> bool:
        """Run by a recipe of Megatron-Bridge."""
        return self.software.endswith("Megatron-Bridge")

    @property
    def software(self) -> str:
        """What ran it, by the name of its calibration."""
        return self.cells["framework"].partition(" (")[0]

    @property
    def recompute(self) -> frozenset[str] | None:
        """By modules; `{"layer"}` is whole layers. None where it is not said."""
        text = self.cells["recompute"].removeprefix("selective").lstrip(": ")
        if text.startswith("full"):
            return frozenset({"layer"})
        if text == "" or text.startswith("unknown"):
            return None
        if text == "none":
            return frozenset()
        if text in ("layer", "op"):
            raise UnpricedError(
                f"recompute={self.cells['recompute']}: every other layer, or operations by torch's choice"
            )
        modules = text.replace(" ", "").split(",")
        return frozenset("mla_up_proj" if module == "up_proj" else module for module in modules)

    def _model(self) -> ModelArchitecture:
        cells, arch = self.cells, self.cells["arch"]
        latent = next((ranks for name, ranks in MULTI_LATENT.items() if cells["model"].startswith(name)), {})
        if ("mla" in arch) != bool(latent) or "hybrid" in arch or "sliding" in arch or not arch:
            raise UnpricedError(f"a model of kind '{arch or 'not said'}'")
        experts = self._count("experts", 0)
        try:
            return ModelArchitecture(
                name=cells["model"],
                layers=self._count("layers"),
                hidden=self._count("hidden"),
                heads=self._count("heads"),
                kv_heads=self._count("kv_heads", self._count("heads") if latent else None),
                head_dim=128 if latent or "qwen3" in cells["model"] else self._count("hidden") // self._count("heads"),
                ffn=self._count("ffn", 0 if experts else None),
                gated="gelu" not in arch,
                vocab=self._count("vocab"),
                experts=experts,
                top_k=self._count("topk", 0),
                expert_ffn=self._count("moe_ffn", 0),
                shared_expert_ffn=self._count("shared_experts", 0) * self._count("moe_ffn", 0),
                capacity_factor=1.0 if "token-drop" in cells["routing"] else 0.0,
                **latent,
            )
        except ValueError as error:
            raise UnpricedError(str(error)) from None

    def _layout(self) -> Layout:
        degrees: dict[str, Any] = {
            axis: self._count(axis, None if axis in ("tp", "pp", "dp") else 1) for axis in LAYOUT_COLUMNS
        }
        try:
            # Megatron-DeepSpeed is older than sequence parallelism.
            alone = self.cells["sp"] == "no" or self.software == "Megatron-DeepSpeed"
            layout = Layout(**degrees, sp=False if alone or degrees["tp"] == 1 else None)
        except InputError as error:
            raise UnpricedError(str(error)) from None
        if layout.world != self._count("gpus"):
            raise UnpricedError(f"tp*cp*dp*pp={layout.world} is not gpus={self.cells['gpus']}")
        return layout

    def _attention_kernel(self) -> AttentionKernel:
        text = self.cells["attn_kernel"]
        if text.startswith("flash_attentionv1"):
            return "flash1"
        if text == "torch":
            return "unfused"
        # Megatron's of 2022 writes scores and normalises them in one kernel.
        written = self.software == "Megatron-DeepSpeed" or (text == "fused" and self.software == "AA-Scaling")
        return "fused_softmax" if written else "flash"

    def _precision(self) -> Precision:
        text = self.cells["precision"].lower()
        if "nvfp4" in text:
            raise UnpricedError("products in four bits")
        if "fp8" in text:
            return "fp8"
        return "fp16" if "fp16" in text and "bf16" not in text else "bf16"

    @property
    def _flexible(self) -> bool:
        """Tokens go once to a node: as the row says, or its recipe."""
        if text := self.cells["dispatcher"]:
            return text.startswith(("DeepEP", "HybridEP"))
        model, device = self.cells["model"], self.cells["gpu_type"]
        recipes = (where for name, where in FLEXIBLE.items() if model.startswith(name))
        return "Bridge" in self.software and any(device.startswith(where) for where in recipes)

    def _load(self) -> Load:
        """As said; where nothing is, Megatron-Bridge's benchmarks force a balance."""
        routing = self.cells["routing"]
        forced = "force" in routing or "drop" in routing or (not routing and "Bridge" in self.software)
        return "balanced" if forced else "natural"

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


@cache
def _with_ports(found: Hardware, bytes_per_second: float) -> Hardware:
    return replace(found, network_link=Link(found.network_link.latency_seconds, bytes_per_second))


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
