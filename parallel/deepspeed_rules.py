"""What the DeepSpeed engine does not run: its rows of the capability table."""

from __future__ import annotations

from jobs.spec import JobSpec
from parallel.layout import Layout
from parallel.rules import DEEPSPEED, JobRule, Reason, Rule, when


def _optimizer_state_stays(job: JobSpec) -> str | None:
    stage, place = job.layout.zero_stage, job.layout.offload_optimizer
    least = {"none": 0, "cpu": 1, "nvme": 3}[place]
    return None if stage >= least else f"wants zero_stage of at least {least}, zero_stage={stage}"


def _weights_stay(job: JobSpec) -> str | None:
    stage, place = job.layout.zero_stage, job.layout.offload_parameters
    return None if stage == 3 or place == "none" else f"wants zero_stage=3, zero_stage={stage}"


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
        "layout.recompute",
        DEEPSPEED,
        when(lambda job: job.layout.recompute == "selective", "the deepspeed engine recomputes whole layers, or none"),
        nearest="full",
    ),
    JobRule(
        "layout.optimizer_replicas",
        DEEPSPEED,
        when(lambda job: job.layout.optimizer_replicas > 1, "ZeRO shards over all data parallel ranks"),
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
    JobRule("layout.offload_optimizer", DEEPSPEED, _optimizer_state_stays, nearest="none"),
    JobRule("layout.offload_parameters", DEEPSPEED, _weights_stay, nearest="none"),
    JobRule("layout.nvme_folder", DEEPSPEED, _no_nvme_folder),
)


def _above_one(axis: str, why: str) -> Reason:
    def reason(layout: Layout, job: JobSpec) -> str | None:
        degree = layout.degree(axis)
        return None if degree == 1 else f"{axis}={degree}: {why}"

    return reason


def _experts_under_zero_3(layout: Layout, job: JobSpec) -> str | None:
    if layout.ep == 1 or job.layout.zero_stage < 3:
        return None
    return f"ep={layout.ep}: ZeRO-3 shards a weight over all of dp, and experts differ there; zero_stage=3"


ATTENTION_RULES = (
    Rule(
        "tensor parallelism",
        "tp",
        DEEPSPEED,
        _above_one("tp", "tensor parallelism is not available in the deepspeed engine yet"),
    ),
    Rule(
        "context parallelism",
        "cp",
        DEEPSPEED,
        _above_one("cp", "context parallelism is not available in the deepspeed engine yet"),
    ),
    Rule("pipeline", "pp", DEEPSPEED, _above_one("pp", "the pipeline is not available in the deepspeed engine yet")),
    Rule("virtual stages", "vpp", DEEPSPEED, _above_one("vpp", "DeepSpeed's pipeline has no virtual stages")),
)

EXPERT_RULES = (
    Rule(
        "expert tensor parallelism",
        "etp",
        DEEPSPEED,
        _above_one("etp", "the deepspeed engine shards experts over ep, never within one"),
    ),
    Rule("experts under ZeRO-3", "ep", DEEPSPEED, _experts_under_zero_3),
)
