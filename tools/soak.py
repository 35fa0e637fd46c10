"""Many runs on one server, some cancelled, some failing: does memory grow, is anything stuck, is each result as its first?

    python -m tools.soak [--runs 300] [--seed 0] [--json output/soak.json]

The graphs are those of tests/graphs, made small. The server's memory is read from outside, after every run. ComfyUI keeps the
results of the last graph alone (--cache-classic), and two graphs in a row have different clips, so that nodes do run.
"""

import argparse
import hashlib
import json
import random
import signal
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import urlencode

from tools import places, processes
from tools.demo import load_graph
from tools.server import Graph, GraphError, GraphInterrupted, Progress, Server

GRAPHS = ("reconstruct", "edit", "tokenflow", "fatezero", "long_clip")
SMALL = {"frames": 4, "size": 64, "keyframe_every": 2, "keyframes": 2, "num_bases": 16, "frames_per_batch": 2}
STEPS = 4
SETTLED = 20  # runs after which memory is not to grow
PATIENCE = 300  # seconds until a run counts as stuck
WAYS = ("whole", "whole", "whole", "cancelled", "failing")  # by how many of the runs


class Run(NamedTuple):
    """What became of one run."""

    graph: str
    way: str  # of WAYS
    outcome: str  # digest of what it shows, "cancelled", or the error
    seconds: float
    resident: int  # bytes of the server's memory afterwards


class Fault(Exception):
    """The server did not behave."""


def small(name: str, clip_seed: int) -> Graph:
    """A graph of tests/graphs that takes a second or two, without its video."""
    graph = load_graph(name, STEPS)
    for node in graph.values():
        for key, value in SMALL.items():
            if isinstance(node["inputs"].get(key), int):
                node["inputs"][key] = value
        if node["class_type"] == "STEMDemoClip":
            node["inputs"]["seed"] = clip_seed
    return {key: node for key, node in graph.items() if node["class_type"] not in ("CreateVideo", "SaveVideo")}


def failing(graph: Graph) -> Graph:
    """The graph with an input that its last node of ours refuses when it runs."""
    *_, node = (node for node in graph.values() if "blocks" in node["inputs"])
    node["inputs"]["blocks"] = "nowhere"
    return graph


def digest(server: Server, entry: dict[str, Any]) -> str:
    """Of all pictures that a run shows."""
    whole = hashlib.sha256()
    for node_id in sorted(entry["outputs"]):
        for file in entry["outputs"][node_id].get("images", []):
            whole.update(server.get(f"/view?{urlencode(file)}"))
    return whole.hexdigest()


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def run_once(server: Server, name: str, way: str, clip_seed: int, stop_at: int) -> str:
    """Runs a graph, and cancels it at the given report of progress where it is to be cancelled; returns its outcome.

    Raises:
        Fault: It was not cancelled, or did not fail as it should.
    """
    graph, seen = small(name, clip_seed), []

    def watch(step: Progress) -> None:
        seen.append(step)
        if way == "cancelled" and len(seen) == stop_at:
            server.interrupt()

    try:
        entry = server.run(failing(graph) if way == "failing" else graph, watch, PATIENCE)
    except GraphInterrupted:
        if way != "cancelled":
            raise Fault(f"{name} was cancelled by nobody") from None
        return "cancelled"
    except GraphError as error:
        if way != "failing" or "nowhere" not in error.message:
            raise Fault(f"{name} failed: {error}") from error
        return str(error)
    if way == "failing":
        raise Fault(f"{name} ran although its blocks are nonsense")
    return digest(server, entry)  # a run may be over before it is cancelled


def soak(server: Server, runs: int, seed: int) -> list[Run]:
    """Runs graphs one after another, in an order that the seed decides.

    Raises:
        Fault: A result differs from the first of its graph, a run is stuck, or an error is another than expected.
    """
    draw, done, first, place = random.Random(seed), [], {}, -1  # noqa: S311, nothing secret
    for number in range(runs):
        warming = number < len(GRAPHS)  # each is seen whole first, and none twice in a row
        way = "whole" if warming else draw.choice(WAYS)
        place = (place + (1 if warming else draw.randrange(1, len(GRAPHS)))) % len(GRAPHS)
        name, stop_at = GRAPHS[place], draw.randrange(2, 12)
        start = time.monotonic()
        try:
            outcome = run_once(server, name, way, 10 + place, stop_at)
        except TimeoutError as error:
            raise Fault(f"run {number}, {name}: {error}") from error
        done.append(Run(name, way, outcome, time.monotonic() - start, resident(server.pid)))
        expected = first.setdefault((name, way == "failing"), outcome)
        if outcome not in (expected, "cancelled"):
            raise Fault(f"run {number}, {name}, {way}: {outcome} is not what it was first, {expected}")
        queue = server.get("/queue")
        if queue["queue_running"] or queue["queue_pending"]:
            raise Fault(f"run {number}, {name}: something is left in the queue")
        if sys.stderr.isatty() or number % 20 == 19:
            print(f"{number + 1} of {runs}: {done[-1].resident / 1e6:.0f} MB", file=sys.stderr, flush=True)
    return done


def growth(done: list[Run], settled: int = SETTLED) -> float:
    """Of memory from the tenth of the runs after the first `settled` ones to the last tenth, in parts of it (medians)."""
    sizes = [run.resident for run in done[settled:]]
    tenth = max(3, len(sizes) // 10)
    return median(sizes[-tenth:]) / median(sizes[:tenth]) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=places.ROOT / "output" / "soak.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, processes.interrupted)  # so that the server is ended too
    with Server(argv=("--cpu", "--cache-classic")) as server:
        try:
            done = soak(server, options.runs, options.seed)
        except Fault as fault:
            print(fault, file=sys.stderr)
            return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps([run._asdict() for run in done], indent=1) + "\n", encoding="utf-8")
    ways = {way: sum(run.way == way for run in done) for way in sorted(set(WAYS))}
    stopped = sum(run.outcome == "cancelled" for run in done)
    sizes = [run.resident / 1e6 for run in done]
    print(f"{len(done)} runs: {ways}, {stopped} of the cancelled ones before their end; every result as its first.")
    print(f"Memory: {sizes[min(SETTLED, len(sizes) - 1)]:.0f} MB after {SETTLED} runs, {sizes[-1]:.0f} MB at the end, ")
    print(f"{max(sizes):.0f} MB at most; growth after the first {SETTLED}: {growth(done):+.1%} (median of tenths).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
