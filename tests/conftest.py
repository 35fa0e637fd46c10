"""Tests import `stem` and `tools` from the checkout. It stands last: ComfyUI has a top-level `nodes` too."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)

sys.path[:] = [entry for entry in sys.path if str(Path(entry).resolve()) != ROOT] + [ROOT]
