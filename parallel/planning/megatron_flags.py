"""A resolved job as command-line flags of Megatron-LM's pretrain_gpt.py (version core_v0.16.1)."""

from __future__ import annotations

from jobs.architecture import ModelArchitecture
from jobs.spec import JobSpec, LayoutSpec, TrainSpec

Flag = str | int | float | None
"""A flag's value; None for one that has none."""


def megatron_flags(job: JobSpec) -> list[str]:
    """One flag a line, with its value: model, layout and optimisation of a job whose degrees are all given.

    Data, tokenizer, checkpoints and logs are left to add. The vocabulary is not padded: a plan's tp divides it.
    """
    flags = _model(job.model) | _layout(job.layout) | _training(job.train, job.layout.micro_batch or 1)
    if job.model.is_moe:
        flags |= _experts(job.model, job.layout)
    return [f"--{name}" if value is None else f"--{name} {value}" for name, value in flags.items()]


def _model(model: ModelArchitecture) -> dict[str, Flag]:
    flags: dict[str, Flag] = {
        "num-layers": model.layers,
        "hidden-size": model.hidden,
        "ffn-hidden-size": model.ffn or model.expert_ffn,
        "num-attention-heads": model.heads,
        "group-query-attention": None,
        "num-query-groups": model.kv_heads,
        "kv-channels": model.head_dim,
        "vocab-size": model.vocab,
        "make-vocab-size-divisible-by": 1,
        "position-embedding-type": "rope",
        "rotary-base": round(model.rope_theta),
        "normalization": "RMSNorm",
        "norm-epsilon": model.norm_epsilon,
        "init-method-std": model.init_std,
        "swiglu": None,
        "disable-bias-linear": None,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
    }
    switches = {
        "untie-embeddings-and-output-weights": not model.tied_embeddings,
        "add-qkv-bias": model.attention_bias,
        "qk-layernorm": model.qk_norm,
    }
    return flags | {name: None for name, on in switches.items() if on}


def _layout(layout: LayoutSpec) -> dict[str, Flag]:
    degrees = layout.degrees
    flags: dict[str, Flag] = {
        "tensor-model-parallel-size": degrees["tp"],
        "context-parallel-size": degrees["cp"],
        "pipeline-model-parallel-size": degrees["pp"],
        "use-distributed-optimizer": None,
        "num-distributed-optimizer-instances": layout.options["optimizer_replicas"],
    }
    if degrees["tp"] > 1:
        flags["sequence-parallel"] = None
    if degrees["cp"] > 1:
        flags["cp-comm-type"] = "p2p" if layout.context_attention == "ring" else "all_gather"
    if degrees["vpp"] > 1:
        flags["num-virtual-stages-per-pipeline-rank"] = degrees["vpp"]
    if layout.stage_layers is not None:
        flags["pipeline-model-parallel-layout"] = f"E{'|'.join('t' * layers for layers in layout.stage_layers)}L"
    if layout.recompute == "full":
        flags |= {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    elif layout.recompute == "selective":
        flags |= {
            "recompute-granularity": "selective",
            "recompute-modules": " ".join(layout.options["recompute_modules"]),
        }
    return flags


def _experts(model: ModelArchitecture, layout: LayoutSpec) -> dict[str, Flag]:
    flags: dict[str, Flag] = {
        "expert-model-parallel-size": layout.degrees["ep"],
        "expert-tensor-parallel-size": layout.degrees["etp"],
        "num-experts": model.experts,
        "moe-ffn-hidden-size": model.expert_ffn,
        "moe-router-topk": model.top_k,
        "moe-router-score-function": model.router_score,
        "moe-router-dtype": "fp32",
        "moe-token-dispatcher-type": layout.dispatcher,
        "moe-grouped-gemm": None,
        "moe-router-load-balancing-type": "seq_aux_loss" if model.aux_loss else "none",
        "moe-aux-loss-coeff": model.aux_loss,
    }
    if model.dense_layers:
        flags["moe-layer-freq"] = f"([0]*{model.dense_layers}+[1]*{model.moe_layers})"
    if model.shared_expert_ffn:
        flags["moe-shared-expert-intermediate-size"] = model.shared_expert_ffn
    if model.router_bias:
        flags |= {"moe-router-enable-expert-bias": None, "moe-router-bias-update-rate": model.router_bias_rate}
    if model.router_scale != 1:
        flags["moe-router-topk-scaling-factor"] = model.router_scale
    if model.z_loss:
        flags["moe-z-loss-coeff"] = model.z_loss
    if model.capacity_factor:
        flags |= {"moe-expert-capacity-factor": model.capacity_factor, "moe-token-drop-policy": model.drop_order}
    switches = {
        "moe-shared-expert-gate": model.shared_expert_gate,
        # A softmax over all experts, whose chosen weights then do not sum to one.
        "moe-router-pre-softmax": model.router_score == "softmax" and not model.router_normalize_top_k,
    }
    return flags | {name: None for name, on in switches.items() if on}


def _training(train: TrainSpec, micro_batch: int) -> dict[str, Flag]:
    flags: dict[str, Flag] = {
        "seq-length": train.sequence_length,
        "max-position-embeddings": train.sequence_length,
        "micro-batch-size": micro_batch,
        "global-batch-size": train.global_batch,
        "train-iters": train.steps,
        "lr": train.learning_rate,
        "min-lr": train.min_learning_rate,
        "lr-decay-style": "cosine",
        "lr-warmup-iters": train.warmup_steps,
        "weight-decay": train.weight_decay,
        "adam-beta1": train.adam_beta1,
        "adam-beta2": train.adam_beta2,
        "adam-eps": train.adam_epsilon,
        "clip-grad": train.clip_grad_norm,
        "seed": train.seed,
        "eval-iters": train.eval_batches,
    }
    if train.eval_interval:
        flags["eval-interval"] = train.eval_interval
    if train.precision == "bf16":
        flags["bf16"] = None
    return flags
