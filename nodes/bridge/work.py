"""Progress of a node's own work on frames."""

from collections.abc import Callable

import comfy.model_management
import comfy.utils


def per_frame(total: int) -> Callable[[], None]:
    """What to call with every piece of work that is done: moves the node's progress bar, and lets the user cancel."""
    bar = comfy.utils.ProgressBar(total)

    def done() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return done
