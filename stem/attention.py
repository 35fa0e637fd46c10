"""What the self-attention of a video's frames reads: a few bases, or the keys and values of chosen frames.

A context is built apart from the attention over it, so that a host can use its own attention kernel. Context
functions take keys or values (f, n, c) of all frames, heads not split, and return what every frame attends
to, (f, tokens, c).
"""

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def own_frame(x: Tensor) -> Tensor:
    """Every frame attends to itself, (f, n, c): an image model as it is, and plain DDIM inversion."""
    return x


def first_previous(x: Tensor) -> Tensor:
    """Every frame attends to the first and the previous one, not to itself: [x_0; x_max(f-1, 0)], (f, 2n, c).

    Source: Tune-A-Video's sparse-causal attention; FateZero has the same frames in the other order, which
    changes nothing.
    """
    previous = torch.cat([x[:1], x[:-1]])
    return torch.cat([x[:1].expand_as(x), previous], dim=1)


def all_frames(x: Tensor) -> Tensor:
    """Every frame attends to all frames, (f, f n, c): one tensor, seen f times without a copy.

    Source: the "inflated" attention that STEM inversion is compared with.
    """
    return repeat(x, "f n c -> g (f n) c", g=len(x))


def basis_context(bases: Tensor, frames: int) -> Tensor:
    """Every frame attends to the bases (h, m, d) of keys or values: (f, m, h d), one tensor seen f times."""
    return repeat(rearrange(bases, "h m d -> m (h d)"), "m c -> f m c", f=frames)


def pool_tokens(x: Tensor, heads: int) -> Tensor:
    """Tokens (f, n, c) of all frames together, by head, as `em.estimate_basis` takes them: (h, f n, d)."""
    return rearrange(x, "f n (h d) -> h (f n) d", h=heads)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention with heads not split: q (f, n, c), k and v (f, tokens, c) -> (f, n, c).

    For tests and hosts without a kernel of their own.
    """
    q, k, v = (rearrange(x, "f n (h d) -> f h n d", h=heads) for x in (q, k, v))
    return rearrange(scaled_dot_product_attention(q, k, v), "f h n d -> f n (h d)")


def basis_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q mu^T / sqrt(d)) nu: every frame reads the same bases.

    Args:
        q: queries, (f, h, n, d).
        keys: bases mu, (h, m, d).
        values: bases nu, (h, m, d).

    Returns:
        (f, h, n, d).

    Source: STEM inversion. No bias for how many tokens a basis stands for, and dead bases take part, as in
    the official code.
    """
    keys, values = (repeat(x, "h m d -> f h m d", f=len(q)) for x in (keys, values))
    return scaled_dot_product_attention(q, keys, values)
