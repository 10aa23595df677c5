"""The oracle against transformers, and its parts against plain computations of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from architectures import FAMILIES, random_weights

from models.huggingface import write
from models.reference import Decoder


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family]
    weights = random_weights(model, dtype)
    list(write(tmp_path, model, weights.__getitem__, dtype, sequence_length=16))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    assert theirs.config.model_type == family
    decoder = Decoder(model).to(dtype)
    decoder.load_state_dict(weights)
    ours = decoder(TOKENS).logits
    assert ours.dtype == dtype
    error = (ours - theirs(TOKENS).logits).norm() / ours.norm()
    print(family, dtype, float(error), float(ours.std()))
    assert error < 1e-5
