"""A training step as the planner's arithmetic sees it: what is computed, how it is spread, what is kept.

A job makes one for each layout and micro-batch it may have (`Workload.of`); a row of published measurements makes one
too (evidence/published.py). Time and memory are estimated from this alone, so that what is validated is what plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from operator import attrgetter
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from jobs.architecture import ModelArchitecture
from jobs.spec import JobSpec
from parallel.estimates.loads import Load, Recorded, recorded
from parallel.estimates.software import OURS
from parallel.layout import Layout

Precision = Literal["fp32", "fp16", "bf16", "fp8"]
"""Of matrix products. With fp8, weights are kept in bf16, and activations but those that products alone keep."""

AttentionKernel = Literal["flash", "flash1", "fused_softmax", "unfused"]
"""Keep no scores: FlashAttention 2 and later (cuDNN's, SDPA's too), FlashAttention 1; or write them: with a fused
softmax, or with each of scaling, masking, softmax and dropout in a kernel of its own."""


Loss = Literal["parallel", "fused", "whole"]
"""Made of each rank's share of the vocabulary, with an fp32 softmax, or by one kernel that keeps nothing beside the
logits; or of whole logits on every rank, by torch in fp32."""


@dataclass(frozen=True)
class Swapping:
    """Activations go to host memory until backward (parallel/offload.py)."""

    share: float | Literal["auto"]
    """Of the tokens, the others being computed again; auto: as the closed form of parallel/swap.py has it."""
    leaves: bool = True
    """False on a CPU, whose memory is its device's."""


@dataclass(frozen=True)
class Workload:
    """One step of a model at a layout. All sizes are of the whole job unless said otherwise."""

    model: ModelArchitecture
    layout: Layout
    sequence_length: int
    global_batch: int
    """Sequences a step."""
    micro_batch: int
    """Sequences a rank computes at once."""
    precision: Precision = "bf16"
    devices_per_node: int = 8

    recompute: frozenset[str] = field(default_factory=frozenset)
    """Modules that backward computes again, by jobs.spec.RecomputedModule; `{"layer"}` is whole layers, `moe_act` the
    activations of experts, which `kernels.experts` never keeps."""
    attention_kernel: AttentionKernel = "flash"
    fused_norm: bool = True
    """A norm is one kernel; False: each of its operations is one, in fp32."""
    activation_copies: int = 0
    """Tensors that SwiGLU keeps between its input and its output; none where it is one kernel."""
    loss: Loss = "parallel"
    own_kernels: bool = False
    """The megatron engine's (kernels/): queries and keys are rotated in a pass of its own, and value stays where the
    projection wrote all three; where one rank has the whole head its logits are made by chunks. On a GPU rows go to
    experts and back at the memory's rate, and activations of experts and the loss of a whole head are within products'
    kernels or one of their own."""
    software: str = ""
    """What runs it, as calibrations name it; one that is not known gets arithmetic without residuals."""
    context_attention: Literal["gather", "ring", "ulysses"] = "gather"
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    expert_parallelism: Literal["ep", "fssdp"] = "ep"
    """fssdp: ranks share the experts that have most tokens (parallel/fssdp.py)."""
    experts_overlap: bool = False
    """All-to-alls of a micro-batch travel beside another's computation (Megatron-Core's 1F1B overlap; DeepSeek-V3,
    arXiv 2412.19437, section 3.2.1)."""
    load: Load | Recorded = "natural"
    """Of experts; with a capacity factor, what is dropped or padded follows from model.capacity_factor."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """Sharded: 1 optimizer state, 2 gradients too, 3 weights too."""
    optimizer_replicas: int = 1
    """Copies of the sharded state: it is sharded over 1 / optimizer_replicas of the data parallel ranks."""
    gradient_bytes: int = 4
    """Of an element of the accumulated gradient: 4, or 2 where it stays in the weights' precision."""
    moment_bytes: int = 4
    """Of an element of each of Adam's two moments."""
    optimizer_offloaded: float = 0.0
    """Share of the optimizer's state and step that is the host's."""
    weights_offloaded: bool = False
    swapping: Swapping | None = None
    """None: all activations stay."""

    @classmethod
    def of(cls, job: JobSpec, layout: Layout, micro_batch: int) -> Workload:
        """A job's step at a layout; what the job leaves to the engine is as the engine chooses."""
        options = job.layout.options
        modules = {"none": (), "selective": options["recompute_modules"], "full": ("layer",)}[options["recompute"]]
        if job.model.is_moe and job.engine == "megatron":
            modules = (*modules, "moe_act")
        own: Literal["gather", "ulysses"] = "ulysses" if job.engine == "deepspeed" else "gather"
        on_gpu = job.cluster.device == "cuda"  # a CPU's memory is its device's: nothing leaves it
        share = job.layout.offload_activations
        return cls(
            model=job.model,
            layout=layout,
            sequence_length=job.train.sequence_length,
            global_batch=job.train.global_batch,
            micro_batch=micro_batch,
            precision=job.train.precision,
            devices_per_node=job.cluster.devices_per_node,
            recompute=frozenset(modules),
            context_attention=job.layout.context_attention or own,
            dispatcher=job.layout.dispatcher,
            expert_parallelism=options["expert_parallelism"],
            load="natural" if job.layout.expert_loads is None else recorded(job.layout.expert_loads, job.model.experts),
            zero_stage=options["zero_stage"],
            optimizer_replicas=options["optimizer_replicas"],
            # The deepspeed engine's SwiGLU is torch's, which keeps silu's output.
            activation_copies=1 if job.engine == "deepspeed" else 0,
            own_kernels=job.engine == "megatron",
            software=OURS if job.engine == "megatron" and on_gpu else "",
            optimizer_offloaded=float(on_gpu and options["offload_optimizer"] != "none"),
            weights_offloaded=on_gpu and options["offload_parameters"] != "none",
            swapping=None if share is None else Swapping(share, on_gpu),
        )

    def at(self, layout: Layout, micro_batch: int) -> Workload:
        """The same step otherwise laid out; as `dataclasses.replace`, but quick."""
        other = object.__new__(Workload)
        vars(other).update(vars(self), layout=layout, micro_batch=micro_batch)
        return other

    @property
    def fused_attention(self) -> bool:
        """Attention that keeps no scores."""
        return self.attention_kernel in ("flash", "flash1")

    @property
    def micro_batches(self) -> int:
        """That each rank computes in a step."""
        return self.global_batch // (self.layout.dp * self.micro_batch)

    @property
    def tokens(self) -> int:
        """Of a micro-batch, seen by each tensor-parallel group."""
        return self.micro_batch * self.sequence_length // self.layout.cp

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def shards(self) -> int:
        """Ranks over which dense state is sharded."""
        return max(1, self.layout.dp * self.layout.cp // self.optimizer_replicas)

    @property
    def expert_shards(self) -> int:
        """Ranks over which experts' state is sharded."""
        return max(1, self.layout.edp // self.optimizer_replicas)


Found = TypeVar("Found")
Others = ParamSpec("Others")
_MOST_KEPT = 1 << 16


def kept_by(
    *names: str,
) -> Callable[[Callable[Concatenate[Workload, Others], Found]], Callable[Concatenate[Workload, Others], Found]]:
    """Keeps what a function of a workload gives, by the fields on which it depends (`model`, `layout.tp`): a search
    asks many thousand times over. What else it is given is positional, and part of what it depends on.
    """
    fields = attrgetter(*names)

    def keeping(
        function: Callable[Concatenate[Workload, Others], Found],
    ) -> Callable[Concatenate[Workload, Others], Found]:
        kept: dict[Any, Found] = {}

        @wraps(function)
        def looked_up(workload: Workload, /, *others: Others.args, **named: Others.kwargs) -> Found:
            key = fields(workload), others
            found = kept.get(key)
            if found is None:
                if len(kept) >= _MOST_KEPT:
                    kept.clear()
                found = kept[key] = function(workload, *others, **named)
            return found

        return looked_up

    return keeping
