from __future__ import annotations

import torch

from orchestrator.worker.engines.adam import AdamW


def test_adam_is_torchs_adam() -> None:
    torch.manual_seed(0)
    start, options = torch.randn(17), {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine, reference = AdamW([{"params": [ours]}], **options), torch.optim.AdamW([theirs], **options)
    mine.state[ours].update(exp_avg=torch.zeros(17), exp_avg_sq=torch.zeros(17))
    for step in range(1, 6):
        ours.grad = torch.randn(17)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
        torch.testing.assert_close(ours, theirs)
        assert mine.param_groups[0]["step"] == step


def test_steps_are_counted_where_a_rank_holds_no_parameters() -> None:
    held = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdamW([{"params": [held]}, {"params": []}], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
