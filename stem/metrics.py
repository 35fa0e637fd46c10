"""How near a clip is to another, and how steady it is: PSNR, SSIM, overlap of masks, flicker along the motion.

Images are as in ComfyUI, (f, height, width, c) in 0..1; masks (f, height, width) weigh pixels, 1 counts and 0
does not. A flow (f - 1, height, width, 2) says for every pixel of frame f how far, in pixels to the right and
down, what it shows has moved in frame f + 1.
"""

import kornia
import torch
from einops import rearrange, reduce
from torch import Tensor

# Estimation of motion
LEVELS = 4  # of the pyramid, each half the size of the one before
WINDOW = 3.0  # standard deviation of the Gaussian window, in pixels of each level
ITERATIONS = 6  # on each level
FLATNESS = 1e-5  # squared gradient (brightness 0..1 per pixel) below which nothing shows motion


def psnr(images: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB of the error in all frames together; infinite for equal clips."""
    return float(_decibel(_mean(_squared_error(images, reference), mask)))


def psnr_per_frame(images: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of every frame in dB, (f,); infinite for equal frames."""
    error = _squared_error(images, reference)
    masks = [None] * len(error) if mask is None else mask.split(1)
    return torch.stack([_decibel(_mean(e, m)) for e, m in zip(error.split(1), masks, strict=True)])


def ssim(images: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """Structural similarity, mean over frames, pixels and channels; 1 for equal clips.

    Source: Wang et al. 2004 as in kornia: Gaussian window of 11 pixels with sigma 1.5, reflected at the
    border.
    """
    images, reference = (rearrange(x, "f height width c -> f c height width") for x in (images, reference))
    similarity = kornia.metrics.ssim(images, reference, window_size=11)
    return float(_mean(rearrange(similarity, "f c height width -> f height width c"), mask))


def iou(masks: Tensor, reference: Tensor) -> Tensor:
    """Intersection over union of every frame's mask with the reference's, (f,); 1 where both are empty.

    Args:
        masks, reference: (f, height, width); what is above 0.5 is in the mask.

    Raises:
        ValueError: the shapes differ.
    """
    if masks.shape != reference.shape or masks.ndim != 3:
        raise ValueError(
            f"the masks have the shapes {tuple(masks.shape)} and {tuple(reference.shape)}; give two of one shape, "
            "(frames, height, width)."
        )
    one, other = masks > 0.5, reference > 0.5
    both, any_of_them = (reduce(m.float(), "f height width -> f", "sum") for m in (one & other, one | other))
    return torch.where(any_of_them > 0, both / any_of_them.clamp(min=1), torch.ones_like(both))


def flicker(images: Tensor, flow: Tensor, valid: Tensor | None = None) -> float:
    """Mean absolute change of what moves along: frame f + 1, fetched back along the flow, against frame f.

    Pixels whose flow leaves the picture do not count. A clip has some flicker of its own (noise, light,
    interpolation between pixels); compare with that of the source under the same flow.

    Args:
        images: (f, height, width, c), at least two frames.
        flow: the motion of the source, exact or from `estimate_flow`, (f - 1, height, width, 2).
        valid: 1 where a pixel of frame f is visible in frame f + 1, (f - 1, height, width); None counts all.

    Raises:
        ValueError: shapes do not fit, or no pixel is visible in two frames.
    """
    needed = (len(images) - 1, *images.shape[1:3], 2)
    if len(images) < 2 or tuple(flow.shape) != needed:
        raise ValueError(
            f"images have the shape {tuple(images.shape)} and the flow {tuple(flow.shape)}; give at "
            "least two frames, and a flow from each to the next, (frames - 1, height, width, 2)."
        )
    back, inside = warp(images[1:], flow)
    return float(_mean((back - images[:-1]).abs(), inside if valid is None else inside * valid))


def warp(images: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Images (f, height, width, c) read at x + flow (f, height, width, 2), bicubic.

    Returns:
        The images fetched back, and 1 where they were read inside the picture, else 0, (f, height, width).
    """
    height, width = flow.shape[1:3]
    size = flow.new_tensor([width - 1, height - 1])
    y, x = torch.meshgrid(torch.arange(height, device=flow.device), torch.arange(width, device=flow.device), indexing="ij")
    at = torch.stack([x, y], dim=-1) + flow
    read = torch.nn.functional.grid_sample(
        rearrange(images, "f height width c -> f c height width"),
        (2 * at / size - 1).to(images.dtype),
        mode="bicubic",
        padding_mode="border",
        align_corners=True,
    )
    inside = reduce((at >= 0) & (at <= size), "f height width xy -> f height width", "all")
    return rearrange(read, "f c height width -> f height width c"), inside.to(images.dtype)


def estimate_flow(images: Tensor) -> tuple[Tensor, Tensor]:
    """Motion from every frame to the next, by Lucas and Kanade's method on a pyramid.

    Take it from the source clip, once, and use it for all clips compared with that. Textured surfaces are
    followed over some 10 pixels a frame. Flat areas take the motion of their surroundings, motion edges are
    blurred by the width of the window, changes of light are taken for motion.

    Args:
        images: (f, height, width, c), at least two frames of 16x16 pixels.

    Returns:
        flow (f - 1, height, width, 2), and 1 where it is to be trusted, else 0 (f - 1, height, width): flow
        forth and back cancel out to half a pixel and a tenth of their length.

    Raises:
        ValueError: too few frames or pixels.

    Source: Lucas and Kanade 1981; coarse to fine as Bouguet 2001; the check forth and back as Sundaram et al.
    2010.
    """
    if len(images) < 2 or min(images.shape[1:3]) < 16:
        raise ValueError(f"images have the shape {tuple(images.shape)}; give two frames of 16x16 pixels or more.")
    grey = reduce(images, "f height width c -> f 1 height width", "mean")
    forth, back = _lucas_kanade(grey[:-1], grey[1:]), _lucas_kanade(grey[1:], grey[:-1])
    returned, inside = warp(back, forth)
    gap, *lengths = (reduce(x**2, "f height width xy -> f height width", "sum") for x in (forth + returned, forth, returned))
    return forth, inside * (gap <= 0.01 * sum(lengths) + 0.25)


def _lucas_kanade(first: Tensor, second: Tensor) -> Tensor:
    """Flow (f, height, width, 2) between frames (f, 1, height, width)."""
    pyramid = [(first, second)]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[-2:]) >= 32:
        pyramid.append(tuple(kornia.geometry.transform.pyrdown(x) for x in pyramid[-1]))
    flow = first.new_zeros(len(first), 2, *pyramid[-1][0].shape[-2:])
    for first, second in reversed(pyramid):
        flow = _refine(first, second, _resize_flow(flow, first.shape[-2:]))
    return rearrange(flow, "f xy height width -> f height width xy")


def _refine(first: Tensor, second: Tensor, flow: Tensor) -> Tensor:
    """Corrects the flow (f, 2, height, width) by Gauss-Newton steps on the difference in the window."""
    # What moves on a coarser level drags still surroundings along: let go of what fits much better unmoved.
    still = torch.zeros_like(flow)
    moved_error, still_error = (_blur(_difference(first, second, x)[0] ** 2) for x in (flow, still))
    flow = torch.where(2 * still_error < moved_error, still, flow)
    gx, gy = rearrange(kornia.filters.spatial_gradient(first), "f 1 xy height width -> xy f 1 height width")
    for _ in range(ITERATIONS):
        difference, inside = _difference(first, second, flow)
        terms = torch.cat([gx * gx, gx * gy, gy * gy, gx * difference, gy * difference], dim=1) * inside
        xx, xy, yy, xd, yd = rearrange(_blur(terms), "f term height width -> term f 1 height width")
        xx, yy = xx + FLATNESS, yy + FLATNESS
        step = torch.cat([xy * yd - yy * xd, xy * xd - xx * yd], dim=1) / (xx * yy - xy * xy)
        flow = flow + step.clamp(-1, 1)
    return flow


def _difference(first: Tensor, second: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Second frames read along the flow (f, 2, height, width), less the first; and where that is known."""
    second = rearrange(second, "f 1 height width -> f height width 1")
    back, inside = warp(second, rearrange(flow, "f xy height width -> f height width xy"))
    back = rearrange(back, "f height width 1 -> f 1 height width")
    return back - first, rearrange(inside, "f height width -> f 1 height width")


def _blur(x: Tensor) -> Tensor:
    size = 2 * round(3 * WINDOW) + 1
    return kornia.filters.gaussian_blur2d(x, (size, size), (WINDOW, WINDOW))


def _resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = flow.shape[-2:]
    factor = flow.new_tensor([size[1] / width, size[0] / height])
    flow = torch.nn.functional.interpolate(flow, size, mode="bilinear", align_corners=False)
    return flow * rearrange(factor, "xy -> xy 1 1")


def _squared_error(images: Tensor, reference: Tensor) -> Tensor:
    if images.shape != reference.shape:
        raise ValueError(f"the clips have the shapes {tuple(images.shape)} and {tuple(reference.shape)}; give equal ones.")
    return (images - reference) ** 2


def _mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (f, height, width, c), the pixels weighed by the mask (f, height, width)."""
    if mask is None:
        return error.mean()
    if mask.shape != error.shape[:3]:
        raise ValueError(f"the mask has the shape {tuple(mask.shape)}; give one weight a pixel, {tuple(error.shape[:3])}.")
    total = mask.sum()
    if total == 0:
        raise ValueError("the mask is empty: no pixel is left to compare.")
    return (reduce(error, "f height width c -> f height width", "mean") * mask).sum() / total


def _decibel(squared_error: Tensor) -> Tensor:
    return -10 * torch.log10(squared_error)
