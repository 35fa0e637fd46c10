"""A basis as a picture: the keys of a clip, the bases that explain them, and how EM came to these bases."""

from typing import NamedTuple

import comfy.model_management as management
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor

from ...stem.basis import Basis, BlockLayout, bases_at
from ...stem.basis_report import BasisFigures
from ...stem.ddim import nearest_level
from ...stem.em import alive, derive_seed, initial_bases, revive_bases
from ...stem.palette import colour_bases, paint, token_of_pixel
from ...stem.trajectory import Trajectory
from ...stem.usage import convergence, fit, read_usage
from .layout import Layout, activation_size, block_scales, slot_of
from .sight import keys_at

FURTHER = 5
"""Rounds of EM beyond those of the basis, to see what they would gain."""


class BasisView(NamedTuple):
    """What there is to see of one head of a block."""

    images: Tensor  # (f, height, width, 3), painted
    colours: Tensor  # (m, 3) of the bases, sRGB
    figures: BasisFigures


class Start(NamedTuple):
    """Where EM of a basis began."""

    bases: Tensor  # (m, d)
    rounds: int
    how: str


def chosen_level(trajectory: Trajectory, share: float) -> int:
    """The level of a trajectory, 1 to t, at a share of those at which the model was called."""
    return 1 + round(share * (len(trajectory.sigmas) - 2))


def view_basis(
    model: ModelPatcher,
    layout: Layout,
    basis: Basis,
    trajectory: Trajectory,
    images: Tensor,
    block: BlockLayout,
    head: int,
    level: int,
    opacity: float,
) -> BasisView:
    """Paints a clip in the colours of its bases.

    Args:
        model: That the trajectory was recorded with; left as it is.
        layout: Of the model.
        basis, trajectory: That fit it.
        images: (f, height, width, 3), as many as the trajectory has.
        block, head: To look into.
        level: 1 to t, of the trajectory.
        opacity: Of the colours, 0..1.
    """
    check = management.throw_exception_if_processing_interrupted
    sigma, temperature = float(trajectory.sigmas[level]), basis.settings.temperature
    recorded = float(basis.sigmas[nearest_level(basis.sigmas, sigma)])
    other = f", bases of sigma {recorded:.3g}" if abs(recorded / sigma - 1) > 0.01 else ""
    keys = keys_at(model, layout, basis, trajectory, block.name, head, level)
    mu = bases_at(basis, block.name, sigma)[0][head].float()
    scale = block_scales(model.model.diffusion_model)[slot_of(block.name)]
    latents = trajectory.latents.shape[3:]
    size = activation_size(latents, scale)
    usage = read_usage(rearrange(keys, "f n d -> (f n) d"), mu, temperature, check)
    chosen, responsibility = (
        rearrange(x, "(f y x) -> f y x", y=size[0], x=size[1]) for x in (usage.chosen, usage.responsibility)
    )
    colours = colour_bases(mu, usage.mass, chosen)
    rows, columns = (token_of_pixel(*edge, scale) for edge in zip(images.shape[1:3], latents, strict=True))
    painted = paint(images, colours[chosen], opacity * responsibility, rows, columns)
    seen, of_what = tokens_of_em(basis, keys)
    start = start_of_em(basis, block, head, sigma, seen)
    em = convergence(seen, start.bases, start.rounds, FURTHER, temperature, check)
    figures = BasisFigures(
        place=f"{block.name}, head {head}, noise level {level} of {len(trajectory.sigmas) - 1} (sigma {sigma:.3g}{other})",
        alive=int(alive(mu[None]).sum()),
        usage=usage,
        fits=em.fit,
        rounds=start.rounds,
        fit_of_basis=fit(seen, mu, temperature, check),
        start=f"on {of_what}, from {start.how}.",
    )
    return BasisView(painted, colours, figures)


def tokens_of_em(basis: Basis, keys: Tensor) -> tuple[Tensor, str]:
    """The keys (n, d) that stand for those that the basis was estimated from, of keys (f, n, d); and what they are."""
    frames, ids = len(keys), basis.frame_ids
    if basis.total_frames != frames:
        what = f"all {frames} frames (the basis is of another clip, of {basis.total_frames} frames)"
    elif len(ids) < frames:
        keys, what = keys[list(ids)], f"the {len(ids)} keyframes of {frames} frames that the basis was estimated from"
    else:
        what = f"all {frames} frames"
    return rearrange(keys, "f n d -> (f n) d"), what


def start_of_em(basis: Basis, block: BlockLayout, head: int, sigma: float, keys: Tensor) -> Start:
    """Where EM began with the keys (n, d) of one head: at random, or at the bases of the level before."""
    settings, level = basis.settings, nearest_level(basis.sigmas, sigma)
    seed = derive_seed(settings.seed, block.name, f"{float(basis.sigmas[level]):.5g}", 0)
    each = keys.expand(block.heads, -1, -1)  # the draw is one for all heads
    fresh = initial_bases(each, settings.num_bases, seed)[head : head + 1]
    if not settings.warm_iterations or level == 0:
        return Start(fresh[0], settings.iterations, "random bases")
    before = basis.keys[basis.blocks.index(block.name)][level - 1, head : head + 1]
    return Start(revive_bases(before, fresh)[0], settings.warm_iterations, "the bases of the level below (warm start)")
