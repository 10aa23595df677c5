"""What the DeepSpeed engine does not run: its rows of the capability table."""

from __future__ import annotations

from jobs.spec import JobSpec
from parallel.layout import Layout
from parallel.rules import DEEPSPEED, JobRule, Rule, when


def _optimizer_state_stays(job: JobSpec) -> str | None:
    stage, place = job.layout.zero_stage, job.layout.offload_optimizer
    least = {None: 0, "none": 0, "cpu": 1, "nvme": 3}[place]
    return None if stage is None or stage >= least else f"wants zero_stage of at least {least}, zero_stage={stage}"


def _weights_stay(job: JobSpec) -> str | None:
    stage, place = job.layout.zero_stage, job.layout.offload_parameters
    return None if stage in (None, 3) or place in (None, "none") else f"wants zero_stage=3, zero_stage={stage}"


def _weights_of_32_bits(job: JobSpec) -> str | None:
    refused = job.layout.offload_parameters == "nvme" and job.train.precision != "bf16"
    return (
        f"DeepSpeed reads weights back from nvme in 16 bits, train.precision={job.train.precision}" if refused else None
    )


def _no_nvme_folder(job: JobSpec) -> str | None:
    layout = job.layout
    wanted = "nvme" in (layout.offload_optimizer, layout.offload_parameters) and layout.nvme_folder is None
    return "offload to nvme needs a folder for its files, the same on every node" if wanted else None


JOB_RULES = (
    JobRule(
        "layout.dispatcher",
        DEEPSPEED,
        when(
            lambda job: job.model.is_moe and job.layout.dispatcher != "alltoall",
            "the deepspeed engine sends tokens to experts by an all-to-all of their number",
        ),
        nearest="alltoall",
    ),
    JobRule(
        "layout.context_attention",
        DEEPSPEED,
        when(
            lambda job: job.layout.context_attention in ("gather", "ring"),
            "the deepspeed engine exchanges heads over cp, not keys and values",
        ),
        nearest="ulysses",
    ),
    JobRule(
        "layout.recompute",
        DEEPSPEED,
        when(lambda job: job.layout.recompute == "selective", "the deepspeed engine recomputes whole layers, or none"),
        nearest="full",
    ),
    JobRule(
        "layout.optimizer_replicas",
        DEEPSPEED,
        when(lambda job: (job.layout.optimizer_replicas or 1) > 1, "ZeRO shards over all data parallel ranks"),
        nearest=1,
    ),
    JobRule(
        "layout.zero_stage",
        DEEPSPEED,
        when(
            lambda job: job.layout.zero_stage == 0 and job.train.precision == "bf16",
            "without ZeRO, DeepSpeed adds micro-batches' gradients up in bf16",
        ),
        nearest=1,
    ),
    JobRule(
        "layout.offload_activations",
        DEEPSPEED,
        when(
            lambda job: job.layout.offload_activations is not None and job.layout.zero_stage == 3,
            "ZeRO-3 gathers weights for modules that are called whole, and here tokens are computed in two parts",
        ),
    ),
    JobRule("layout.offload_optimizer", DEEPSPEED, _optimizer_state_stays, nearest="none"),
    JobRule("layout.offload_parameters", DEEPSPEED, _weights_stay, nearest="none"),
    JobRule("layout.offload_parameters", DEEPSPEED, _weights_of_32_bits, nearest="cpu"),
    JobRule("layout.nvme_folder", DEEPSPEED, _no_nvme_folder),
)


def _ulysses_heads(layout: Layout, job: JobSpec) -> str | None:
    parts, heads = layout.tp * layout.cp, job.model.kv_heads
    if layout.cp == 1 or heads % parts == 0:
        return None
    whole = f"cp={layout.cp}" if layout.tp == 1 else f"tp*cp={layout.tp}*{layout.cp}={parts}"
    return f"{whole} does not divide kv_heads={heads}, which Ulysses gives out over cp"


def _sequence(layout: Layout, job: JobSpec) -> str | None:
    length = job.train.sequence_length
    return None if length % layout.cp == 0 else f"cp={layout.cp} does not divide sequence_length={length}"


def _pipeline_under_zero(layout: Layout, job: JobSpec) -> str | None:
    stage = job.layout.zero_stage or 0
    if layout.pp == 1 or stage < 2:
        return None
    return f"pp={layout.pp}: DeepSpeed's pipeline keeps gradients and weights whole; zero_stage={stage}, at most 1"


def _no_virtual_stages(layout: Layout, job: JobSpec) -> str | None:
    return None if layout.vpp == 1 else f"vpp={layout.vpp}: DeepSpeed's pipeline has no virtual stages"


def _experts_follow_tensors(layout: Layout, job: JobSpec) -> str | None:
    if not job.model.is_moe or layout.etp == layout.tp:
        return None
    return f"etp={layout.etp}: the deepspeed engine divides experts' widths over tp={layout.tp} as all others"


def _experts_under_zero_3(layout: Layout, job: JobSpec) -> str | None:
    if layout.ep == 1 or job.layout.zero_stage != 3:
        return None
    return f"ep={layout.ep}: ZeRO-3 shards a weight over all of dp, and experts differ there; zero_stage=3"


ATTENTION_RULES = (
    Rule("virtual stages", "vpp", DEEPSPEED, _no_virtual_stages),
    Rule("pipeline under ZeRO", "pp", DEEPSPEED, _pipeline_under_zero),
    Rule("kv_heads", "cp", DEEPSPEED, _ulysses_heads),
    Rule("sequence_length", "cp", DEEPSPEED, _sequence),
)

EXPERT_RULES = (
    Rule("expert tensor parallelism", "etp", DEEPSPEED, _experts_follow_tensors),
    Rule("experts under ZeRO-3", "ep", DEEPSPEED, _experts_under_zero_3),
)
