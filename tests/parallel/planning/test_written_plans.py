"""Plans written for the frameworks: what they write is taken by the frameworks' own classes.

Megatron-LM's parser is not in the megatron-core package. Since that release it makes its flags from the fields of
megatron-core's classes, so each flag is given to the field that it sets, in TransformerConfig, OptimizerConfig,
DistributedDataParallelConfig, GPTModel or the scheduler, and these are constructed.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch

from jobs.compose import compose
from jobs.spec import JobSpec
from parallel.planning.deepspeed_config import deepspeed_config, outside_the_config
from parallel.planning.megatron_flags import megatron_flags
from parallel.planning.planner import plan_job, resolve

JOBS = [
    ("quickstart", ("layout.tp=2", "layout.ep=2")),
    ("llama3_70b", ("cluster.nodes=8", "layout.vpp=2", "layout.pp=4")),
    ("llama3_8b", ("train.sequence_length=16384", "layout.cp=2", "layout.context_attention=ring")),
    ("mixtral_8x7b", ("cluster.nodes=4", "layout.recompute=full")),
    ("qwen2_57b_a14b", ("cluster.nodes=8", "layout.recompute=selective")),
    ("qwen3_30b_a3b", ("cluster.nodes=4", "model.capacity_factor=1.25", "model.router_score=sigmoid")),
    ("qwen3_30b_a3b", ("cluster.nodes=4", "model.first_dense_layers=1", "model.ffn=6144", "model.z_loss=1e-3",
                       "model.router_bias=true", "model.router_score=sigmoid", "model.aux_loss=0")),
]  # fmt: skip
TO_THE_SCRIPT = {"--train-iters", "--seed", "--eval-iters", "--eval-interval", "--seq-length"} | {
    "--make-vocab-size-divisible-by",  # the script pads
    "--group-query-attention",  # without it, it would not look at --num-query-groups
    "--micro-batch-size",
    "--global-batch-size",
}
"""Flags that only the training script reads."""
RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "swiglu": "gated_linear_unit",
    "num_experts": "num_moe_experts",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "max_position_embeddings": "max_sequence_length",
    "lr": "max_lr",
    "lr_warmup_iters": "lr_warmup_steps",
}
OPPOSITE = {
    "disable_bias_linear": "add_bias_linear",
    "untie_embeddings_and_output_weights": "share_embeddings_and_output_weights",
}


def resolved(name: str, overrides: tuple[str, ...], engine: str = "megatron") -> JobSpec:
    job = compose(name, [f"engine={engine}", *overrides])
    return resolve(job, plan_job(job).plans[0])


def value_of(words: list[str]) -> Any:
    """As the fields have it: `["1e-05"]` is a number, `["mlp", "moe"]` a list, `[]` a switch that is on."""
    if not words:
        return True
    if words[0].startswith("(["):
        return eval(words[0])
    read = []
    for word in words:
        try:
            read.append(ast.literal_eval(word))
        except (ValueError, SyntaxError):
            read.append(word)
    return read[0] if len(read) == 1 else read


@pytest.mark.parametrize(("name", "overrides"), JOBS)
def test_megatrons_classes_take_every_flag(name: str, overrides: tuple[str, ...]) -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer import TransformerConfig

    job = resolved(name, overrides)
    taken = {
        kind: {field.name for field in fields(kind)}
        for kind in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
    } | {kind: set(inspect.signature(kind).parameters) for kind in (GPTModel, OptimizerParamScheduler)}
    given: dict[type, dict[str, Any]] = {kind: {} for kind in taken}
    for line in megatron_flags(job):
        flag, *words = line.split(" ")
        field = flag.removeprefix("--").replace("-", "_")
        names = {OPPOSITE[field]} if field in OPPOSITE else {field, RENAMED.get(field, field)}
        takers = [(kind, each) for kind, known in taken.items() for each in names & known]
        assert takers or flag in TO_THE_SCRIPT, flag
        for kind, each in takers:
            given[kind][each] = False if field in OPPOSITE else value_of(words)
    modules = given[TransformerConfig].get("recompute_modules")
    if isinstance(modules, str):  # a list on the command line, of one
        given[TransformerConfig]["recompute_modules"] = [modules]
    # What the script derives from --bf16.
    dtype = torch.bfloat16 if job.train.precision == "bf16" else torch.float32
    config = TransformerConfig(**given[TransformerConfig], pipeline_dtype=dtype, cuda_graph_scope=[])
    layout = job.layout.degrees
    assert config.tensor_model_parallel_size == layout["tp"]
    assert config.expert_tensor_parallel_size == (layout["etp"] if job.model.is_moe else layout["tp"])
    assert (config.num_layers, config.hidden_size) == (job.model.layers, job.model.hidden)
    assert config.moe_layer_freq == ([0, *[1] * 47] if job.model.first_dense_layers else 1)
    assert OptimizerConfig(**given[OptimizerConfig]).lr == job.train.learning_rate
    assert DistributedDataParallelConfig(**given[DistributedDataParallelConfig]).use_distributed_optimizer
    assert given[GPTModel]["vocab_size"] == job.model.vocab


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("quickstart", ("layout.tp=2",)),
        ("llama3_8b", ("layout.zero_stage=3", "layout.offload_optimizer=cpu", "layout.offload_parameters=cpu")),
        ("llama3_8b", ("layout.cp=2", "layout.recompute=full")),
        ("mixtral_8x7b", ("cluster.nodes=4",)),
    ],
)
def test_deepspeeds_parser_takes_the_config(
    name: str, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime import config as parser

    class Ranks:
        def get_data_parallel_world_size(self) -> int:
            return job.layout.degrees["dp"]

    job = resolved(name, overrides, "deepspeed")
    # The parser asks who it is before it asks the mesh, and takes one rank for granted where nobody answers.
    monkeypatch.setattr(parser.dist, "get_rank", lambda: 0)
    read = parser.DeepSpeedConfig(deepspeed_config(job), mpu=Ranks())
    assert read.train_batch_size == job.train.global_batch
    assert read.train_micro_batch_size_per_gpu == job.layout.micro_batch
    assert read.zero_config.stage == job.layout.zero_stage
    assert read.bfloat16_config.enabled == (job.train.precision == "bf16")
    assert (read.optimizer_name, read.scheduler_name) == ("adamw", "WarmupCosineLR")
    offloaded = read.zero_config.offload_optimizer
    assert (offloaded.device if offloaded else "none") == job.layout.offload_optimizer
    assert len(outside_the_config(job)) == sum(job.layout.degrees[axis] > 1 for axis in ("tp", "pp", "ep")) + (
        job.layout.recompute == "full"
    )
