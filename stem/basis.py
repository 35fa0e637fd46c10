"""Basis: the keys and values that stand for a whole video, of every self-attention block and noise level.

NamedTuples of tensors on the CPU, lists and tuples only: ComfyUI's cache counts the memory of nothing else.
"""

from typing import NamedTuple

from torch import Tensor

from .ddim import nearest_level


class BlockLayout(NamedTuple):
    """One self-attention block of a model."""

    name: str  # "input_1", "middle_0", "output_11"
    heads: int
    head_dim: int


class ModelFingerprint(NamedTuple):
    """What must be equal in two models for the one to read what the other recorded."""

    family: str  # e.g. "SD15"
    prediction: str  # "eps" or "v"
    blocks: tuple[BlockLayout, ...]  # in the order of execution


class BasisSettings(NamedTuple):
    """How the bases were estimated."""

    num_bases: int
    iterations: int
    temperature: float
    seed: int
    frames_per_em: int  # 0: all frames together
    warm_iterations: int = 0  # where an inversion goes on from the bases of the level before; 0: never, as in the paper


class Basis(NamedTuple):
    keys: tuple[Tensor, ...]  # one (t, h, m, d) for each of `blocks`, CPU
    values: tuple[Tensor, ...]  # one (t, h, m, d) for each of `blocks`, CPU
    blocks: tuple[str, ...]  # names, as in BlockLayout
    sigmas: Tensor  # (t,) levels at which the model was called, ascending, CPU
    frame_ids: tuple[int, ...]  # frames that the bases were estimated from
    total_frames: int  # of the clip that those frames are part of
    settings: BasisSettings
    model: ModelFingerprint


def bases_at(basis: Basis, block: str, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of `block`, (h, m, d) each, of the recorded noise level nearest to `sigma` (in log).

    Raises:
        ValueError: nothing was recorded for the block.
    """
    if block not in basis.blocks:
        raise ValueError(
            f'the basis holds nothing for block "{block}", only for {", ".join(basis.blocks) or "none"}; '
            "choose these blocks only, or estimate it again with this block among the chosen ones."
        )
    index, level = basis.blocks.index(block), nearest_level(basis.sigmas, sigma)
    return basis.keys[index][level], basis.values[index][level]


def check_basis(basis: Basis, model: ModelFingerprint, blocks: tuple[str, ...] | None = None) -> None:
    """Whether the model can read the basis.

    Args:
        basis: as recorded.
        model: the model that is to read it.
        blocks: names of the blocks that will read it; None for all that the basis holds.

    Raises:
        ValueError: another family or prediction type, a block that the model or the basis lacks, other heads
        or head sizes.
    """
    found, needed = (basis.model.family, basis.model.prediction), (model.family, model.prediction)
    if found != needed:
        raise ValueError(
            f"the basis was estimated with a {found[0]} model ({found[1]} prediction), "
            f"this model is {needed[0]} ({needed[1]} prediction); estimate a basis with this model."
        )
    layouts = {layout.name: layout for layout in model.blocks}
    for block in basis.blocks if blocks is None else blocks:
        if block not in layouts:
            raise ValueError(f'the model has no self-attention block "{block}"; estimate a basis with this model.')
        layout = layouts[block]
        keys, _ = bases_at(basis, block, basis.sigmas[0])
        heads, _, head_dim = keys.shape
        if (heads, head_dim) != (layout.heads, layout.head_dim):
            raise ValueError(
                f'block "{block}" of the basis has {heads} heads of {head_dim} channels, in this model '
                f"{layout.heads} heads of {layout.head_dim}; estimate a basis with this model."
            )
