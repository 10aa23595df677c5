"""AdamW in the form that Megatron-Core's distributed optimizer saves, loads and reshards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch._dynamo  # torch imports it with the first optimizer: a second in every rank not forked with it
from torch.optim.adamw import adamw


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) on torch's fused kernel, CPU or GPU.

    It counts steps once a group, as Apex's and TransformerEngine's FusedAdam do. torch's own counts once a parameter;
    for that Megatron 0.16.1 loads one shared counter, which then advances once for every parameter it is shared by,
    and its resharding load does not know the counter at all.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("weight decay is decoupled: OptimizerConfig.decoupled_weight_decay must stay True")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] += 1
            held = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not held:
                continue
            # The kernel takes a counter for every parameter and advances it itself.
            steps = torch.full((len(held),), group["step"] - 1, dtype=torch.float32, device=held[0].device)
            adamw(
                held,
                [parameter.grad for parameter in held],
                [self.state[parameter]["exp_avg"] for parameter in held],
                [self.state[parameter]["exp_avg_sq"] for parameter in held],
                [],
                list(steps.unbind()),
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
