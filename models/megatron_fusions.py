"""What Megatron fuses with TransformerEngine or by torch's compiler, by this project's kernels."""

from __future__ import annotations

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import mlp
from torch import Tensor

from kernels.rope import rotate
from kernels.swiglu import swiglu


def install() -> None:
    """Give Megatron the kernels that `apply_rope_fusion` and `bias_activation_fusion` ask for. Idempotent."""
    rope_utils.fused_apply_rotary_pos_emb = _rotate
    mlp.bias_swiglu_impl = _swiglu


def _rotate(heads: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    assert not interleaved, "pairs lie half a head apart"
    return rotate(heads, angles)


def _swiglu(wide: Tensor, bias: None, *unused: bool) -> Tensor:
    assert bias is None, "linears have no bias here"
    return swiglu(wide)
