"""The job spec: everything that decides a training run, frozen, checked once, saved as job.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jobs.architecture import ModelArchitecture, Spec
from jobs.injections import Injection

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DataSpec(Spec):
    """What to train on: text (`files`), or token files of Megatron's preprocess_data (`indexed`)."""

    files: tuple[str, ...] | None = Field(
        None, min_length=1, description="fsspec URLs or globs of text; `stdlib:**/*.py` is the interpreter's library"
    )
    indexed: dict[str, Weight] | None = Field(
        None, min_length=1, description="path of a .bin and .idx, without the ending -> its weight in the blend"
    )
    tokenizer: str = Field("bytes", description="of files: 'bytes', or the path of a tokenizers JSON file")
    packing: bool = Field(False, description="rows of whole documents, each with attention and positions of its own")
    validation_fraction: float = Field(0.02, ge=0, lt=1, description="share of the tokens kept out of training")
    cache: str | None = Field(None, description="folder of the token cache; default: the user's cache folder")

    @field_validator("files", mode="before")
    @classmethod
    def _one_file(cls, files: object) -> object:
        return (files,) if isinstance(files, str) else files

    @field_validator("indexed", mode="before")
    @classmethod
    def _one_prefix(cls, indexed: object) -> object:
        return {indexed: 1.0} if isinstance(indexed, str) else indexed

    @model_validator(mode="after")
    def _one_kind(self) -> DataSpec:
        if (self.files is None) == (self.indexed is None):
            given = "neither" if self.files is None else "both: set data.files=null or data.indexed=null"
            raise ValueError(f"names text (data.files) or token files (data.indexed), and here are {given}")
        if self.indexed is not None and self.tokenizer != "bytes":
            raise ValueError(f"tokenizer={self.tokenizer} reads text, and data.indexed is tokenised already")
        return self


class ClusterSpec(Spec):
    """`nodes` machines of `devices_per_node` equal devices."""

    name: str
    device: Literal["cpu", "cuda"]
    hardware: str = Field(
        description="a profile: one of parallel/estimates/profiles, or the path of a .json file, as `fivefold profile` "
        "writes it"
    )
    nodes: int = Field(1, ge=1)
    devices_per_node: int = Field(ge=1)

    @field_validator("hardware")
    @classmethod
    def _wherever_it_is_read(cls, hardware: str) -> str:
        return str(Path(hardware).expanduser().absolute()) if hardware.endswith(".json") else hardware

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


DEGREES = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp")
"""The fields of LayoutSpec that are degrees of parallelism."""

RecomputedModule = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"]


SIMPLEST: dict[str, Any] = {
    "recompute": "none",
    "recompute_modules": ("core_attn",),
    "zero_stage": 1,
    "optimizer_replicas": 1,
    "offload_optimizer": "none",
    "offload_parameters": "none",
    "expert_parallelism": "ep",
}
"""The options of LayoutSpec that are planned where they are left None, each as an engine runs it without a plan."""


class LayoutSpec(Spec):
    """How a job is spread over ranks; what is left None is planned. Names as in Megatron-Core.

    Nothing here changes what is trained, but where tokens are dropped: `model.capacity_factor` counts what a rank sees.
    """

    tp: int | None = Field(None, ge=1)
    cp: int | None = Field(None, ge=1)
    pp: int | None = Field(None, ge=1)
    vpp: int | None = Field(None, ge=1)
    dp: int | None = Field(None, ge=1)
    ep: int | None = Field(None, ge=1)
    etp: int | None = Field(None, ge=1)
    stage_layers: tuple[int, ...] | None = Field(
        None, description="layers of each pipeline stage, first to last; null: equally many"
    )
    micro_batch: int | None = Field(None, ge=1, description="sequences a rank computes at once")

    recompute: Literal["none", "selective", "full"] | None = Field(None, description="what backward computes again")
    recompute_modules: tuple[RecomputedModule, ...] | None = Field(None, description="what selective recomputes")
    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        None, description="sharded over data parallel ranks: 1 optimizer state, 2 gradients too, 3 weights too"
    )
    optimizer_replicas: int | None = Field(
        None, ge=1, description="copies of the sharded optimizer state; above 1 each is sharded over a part of dp*cp"
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] | None = Field(
        None, description="where its state is; null plans none or cpu"
    )
    offload_parameters: Literal["none", "cpu", "nvme"] | None = Field(
        None, description="where weights are; null plans none or cpu"
    )
    offload_activations: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = Field(
        None,
        description="share of tokens whose activations go to host memory until backward, which computes the others "
        "again; auto: planned, as many as the link to the host carries behind the layers' own work; null: all stay",
    )
    nvme_folder: str | None = Field(None, description="where nvme offload keeps its files, on every node")

    context_attention: Literal["gather", "ring", "ulysses"] | None = Field(
        None, description="what cp exchanges: keys and values at once, or in turn, or heads; null: the engine's first"
    )
    dispatcher: Literal["alltoall", "allgather", "flex"] = Field("alltoall", description="how tokens reach experts")
    expert_parallelism: Literal["ep", "fssdp"] | None = Field(
        "ep",
        description="over the ep ranks: each computes its experts, or fssdp: they share those that have most tokens; "
        "null: as is faster",
    )
    expert_copies: int | None = Field(
        None,
        ge=0,
        description="experts of a layer that a rank may compute beside its own with fssdp; null: as many as memory and "
        "links allow",
    )
    expert_loads: str | None = Field(
        None, description="expert_loads.jsonl of an earlier run, by which the plan knows routing; null: assumed"
    )

    @field_validator("offload_activations", mode="before")
    @classmethod
    def _a_share(cls, share: object) -> object:
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if share not in (None, "auto") and not (is_number and 0 <= float(str(share)) <= 1):
            raise ValueError("is auto, null or a share from 0 to 1")
        return share

    @field_validator("expert_loads")
    @classmethod
    def _wherever_it_is_read(cls, expert_loads: str | None) -> str | None:
        return expert_loads and str(Path(expert_loads).expanduser().absolute())

    @property
    def degrees(self) -> dict[str, int]:
        """Those that are given."""
        return {axis: degree for axis in DEGREES if (degree := getattr(self, axis)) is not None}

    @property
    def options(self) -> dict[str, Any]:
        """Those of SIMPLEST, as they are given; or simplest, where they are not."""
        given = {name: getattr(self, name) for name in SIMPLEST}
        return {name: SIMPLEST[name] if value is None else value for name, value in given.items()}


class TrainSpec(Spec):
    """The optimisation problem. None of it depends on the layout."""

    steps: int = Field(ge=1)
    sequence_length: int = Field(ge=2)
    global_batch: int = Field(ge=1, description="sequences a step, over all ranks")
    precision: Literal["fp32", "bf16"] = "bf16"
    learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0, description="above steps: training ends before the peak, as in a trial")
    weight_decay: float = Field(0.1, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    clip_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")
    seed: int = Field(1234, ge=0)
    deterministic: bool = Field(False, description="equal runs of a layout give equal bits on a GPU too")
    eval_interval: int = Field(0, ge=0, description="steps between validations; 0: only after the last step")
    eval_batches: int = Field(4, ge=0, description="global batches a validation reads; 0: none")

    @model_validator(mode="after")
    def _consistent(self) -> TrainSpec:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} exceeds learning_rate={self.learning_rate}")
        return self


class CheckpointSpec(Spec):
    interval: int = Field(ge=0, description="steps between checkpoints, and one after the last step; 0: none")
    snapshot_interval: int = Field(
        10,
        ge=0,
        description="steps between copies of the state in the node's memory, from which restarts begin; 0: none",
    )
    keep: int = Field(3, ge=1, description="newest checkpoints kept")
    keep_every: int = Field(0, ge=0, description="checkpoints at multiples of so many steps are kept too; 0: none")
    keep_best: int = Field(0, ge=0, description="checkpoints of lowest validation loss that are kept too")


class PolicySpec(Spec):
    max_restarts: int = Field(3, ge=0, description="failed attempts a run survives within window_hours")
    window_hours: float = Field(24.0, gt=0, description="of the rolling window in which failures are counted")
    on_node_lost: Literal["wait", "replan"] = Field(
        "wait", description="for another node, or, after node_wait_seconds, go on at another layout on those left"
    )
    node_wait_seconds: float = Field(60.0, gt=0, description="longest wait for another node before a replan")
    on_straggler: Literal["report", "quarantine", "replan"] = Field(
        "report",
        description="at the next checkpoint; quarantine: a slow rank's node is left for another; replan: its pipeline "
        "stage is given fewer layers",
    )
    grace_seconds: float = Field(300.0, gt=0, description="longest wait for a checkpoint when asked to stop")
    unsaved_minutes: float = Field(
        60.0, gt=0, description="longest training with no new checkpoint kept, where disks or stores refuse them"
    )
    start_timeout_seconds: float = Field(600.0, gt=0, description="longest wait for the cluster's devices")


class FaultSpec(Spec):
    """An injected fault: rank `kill_rank` is killed with SIGKILL when it begins step `at_step`, once a run."""

    kill_rank: int | None = Field(None, ge=0)
    at_step: int = Field(1, ge=1)


class JobSpec(Spec):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    engine: Literal["megatron", "deepspeed"] = "megatron"
    model: ModelArchitecture
    init_from: str | None = Field(None, description="folder of Hugging Face safetensors to begin from; null: random")
    data: DataSpec
    cluster: ClusterSpec
    layout: LayoutSpec
    train: TrainSpec
    checkpoint: CheckpointSpec
    policy: PolicySpec
    fault: FaultSpec = FaultSpec()
    plan_memory: bool = Field(False, description="tell a step's peak before the first, by short rehearsals of it")
    chaos: tuple[Injection, ...] = Field((), description="faults that `fivefold chaos` injects, each once a run")

    @property
    def injections(self) -> tuple[Injection, ...]:
        """All faults to inject, those of `chaos` first; an injection is known by its place here."""
        if self.fault.kill_rank is None:
            return self.chaos
        return (*self.chaos, Injection(kind="kill", rank=self.fault.kill_rank, step=self.fault.at_step, phase="data"))
