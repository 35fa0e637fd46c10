"""python -m tools.bench WHAT [--quick] [--json FILE]; WHAT is one of BENCHMARKS."""

import argparse
from pathlib import Path

import torch

from tools import places
from tools.bench import (
    bases,
    controlnet,
    edit,
    em,
    em_options,
    estimates,
    inversion,
    inversion_cost,
    keyframes,
    report,
    scale,
)

BENCHMARKS = {
    "inversion": inversion.run,
    "bases": bases.run,
    "edit": edit.run,
    "controlnet": controlnet.run,
    "estimates": estimates.run,
    "em": em.run,
    "em-options": em_options.run,
    "inversion-cost": inversion_cost.run,
    "keyframes": keyframes.run,
    "scale": scale.run,
}


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description="Measurements, most of them on the demo model. The file is written as they go on; after an "
        "interruption the same words go on from it.",
    )
    parser.add_argument("what", choices=BENCHMARKS, help="what to measure: README, doc/ and tools/bench/ say more")
    parser.add_argument("--quick", action="store_true", help="a small part of it")
    parser.add_argument("--json", type=Path, help="results (default: output/bench/<what>[-quick].json)")
    args = parser.parse_args()
    name = args.what + ("-quick" if args.quick else "")
    path = args.json or places.ROOT / "output" / "bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        BENCHMARKS[args.what](path, args.quick)
    except report.OtherSettingsError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
