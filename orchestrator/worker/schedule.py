"""The learning rate of a step: a pure function of the spec, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math

from jobs.spec import TrainSpec


def learning_rate(train: TrainSpec, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then a half cosine down to `min_learning_rate` at the last step.

    Steps count from 1; the rate is `learning_rate` at step `warmup_steps`. Cosine decay after Loshchilov and Hutter,
    SGDR (2017), without restarts. Raises ValueError for a step outside of 1..train.steps.
    """
    if not 1 <= step <= train.steps:
        raise ValueError(f"step {step} is not within 1..{train.steps}")
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    progress = (step - train.warmup_steps) / (train.steps - train.warmup_steps)
    span = train.learning_rate - train.min_learning_rate
    return train.min_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
