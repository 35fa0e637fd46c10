"""Attention as core computes it, for patches that choose what to attend to."""

from collections.abc import Mapping
from typing import Any

from comfy.ldm.modules.attention import optimized_attention
from einops import rearrange
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Attention of frames to a context of their own each, or to one for all of them.

    Args:
        q: (f, n, c).
        k, v: (f, m, c) or (1, m, c). With one for all the queries are one long row, and nothing is copied.
        options: The patch's `extra_options`.

    Returns:
        (f, n, c).
    """
    one_for_all = len(k) != len(q)
    row = rearrange(q, "f n c -> 1 (f n) c") if one_for_all else q
    precision = options.get("attn_precision")
    out = optimized_attention(row, k, v, options["n_heads"], attn_precision=precision, transformer_options=options)
    return rearrange(out, "1 (f n) c -> f n c", f=len(q)) if one_for_all else out
