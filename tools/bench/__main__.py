"""python -m tools.bench {inversion,bases,edit} [--quick] [--json FILE]"""

import argparse
from pathlib import Path

import torch

from tools import places
from tools.bench import bases, edit, inversion, report

BENCHMARKS = {"inversion": inversion.run, "bases": bases.run, "edit": edit.run}


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description="Measurements on the demo model. The file is written as they go on; after an interruption the same words "
        "go on from it.",
    )
    parser.add_argument("what", choices=BENCHMARKS, help="ways of inverting compared, the bases looked at, or edits")
    parser.add_argument("--quick", action="store_true", help="few clips, few steps")
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
