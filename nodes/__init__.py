"""The nodes, in the order in which a video passes through them."""

from . import basis, demo, fatezero, files, invert, patch, see, tokenflow

NODES = [
    *demo.NODES, *basis.NODES, *invert.NODES, *patch.NODES, *tokenflow.NODES, *fatezero.NODES, *see.NODES, *files.NODES,
]  # fmt: skip
