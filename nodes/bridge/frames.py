"""Which frames of the clip the rows of one UNet call are."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def frames_of_call(q: Tensor, k: Tensor, options: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Chunks of a call (one for each conditioning in it) and the frame number of every row of a chunk.

    Args:
        q, k: (rows, tokens, channels) as an attn1 replace patch gets them; rows are chunks, inside them frames.
        options: The patch's `extra_options`.

    Raises:
        ValueError: The rows or tokens are not those of the latents' frames.
    """
    rows, tokens = q.shape[:2]
    shape = options.get("activations_shape") or (rows, None, tokens, 1)
    if k.shape != q.shape or rows != shape[0] or tokens != shape[2] * shape[3]:
        raise ValueError(
            f"self-attention has queries {tuple(q.shape)} and keys {tuple(k.shape)} for activations of {tuple(shape)}: another "
            "node changes its tokens (HyperTile, ToMe patch, reference ControlNet). Take that node off this model, or leave "
            "its blocks out of `blocks`."
        )
    chunks = len(options.get("cond_or_uncond") or (0,))
    frames = rows // chunks
    ids = frame_ids(frames, options)
    if frames * chunks != rows or len(ids) != frames:
        raise ValueError(
            f"a call of {rows} rows for {chunks} conditionings does not fit the frames {ids} of this context window. Another "
            "node rearranges the frames: take it off this model."
        )
    return chunks, ids


def frame_ids(frames: int, options: Mapping[str, Any]) -> list[int]:
    """The frame numbers of the rows of one conditioning in a call.

    Args:
        frames: How many rows it has; all there is to go by where neither AnimateDiff nor a window tells the frames.
        options: `transformer_options`.

    Raises:
        ValueError: AnimateDiff and core's context windows at once.
    """
    animatediff, window = options.get("ad_params") or {}, options.get("context_window")
    if animatediff and window is not None:
        raise ValueError(
            "AnimateDiff and core's context windows are both on, and neither knows of the other's frames. Use AnimateDiff's "
            "own context options."
        )
    if animatediff.get("sub_idxs") is not None:
        return list(animatediff["sub_idxs"])
    if window is not None:
        anchor = getattr(window, "causal_anchor_index", None)  # a frame that core puts in front of the window's own
        return ([] if anchor is None or anchor < 0 else [anchor]) + list(window.index_list)
    return list(range(frames))
