"""What no page would send: the server names the node, or gives a result, and lives on."""

import torch

from tools.demo import load_graph, previews
from tools.server import GraphError

WRONG = [None, "", "nan", "x" * 10_000, "\0\n", -1, 2**70, 1e300, [], {}, ["clip"], ["nobody", 0], ["demo", 7], True]
SMALL = {"frames": 3, "size": 64, "num_bases": 8, "em_iterations": 1}


def small_graph():
    graph = load_graph("tokenflow", 2)
    for node in graph.values():
        node["inputs"] |= {name: value for name, value in SMALL.items() if name in node["inputs"]}
    return {name: node for name, node in graph.items() if node["class_type"] not in ("CreateVideo", "SaveVideo")}


def test_the_server_lives_on(server):
    good, pid = small_graph(), server.pid
    first, refused, ran = previews(server, server.run(good)), 0, 0
    ours = [name for name, node in good.items() if node["class_type"].startswith("STEM")]
    assert len(ours) >= 4
    for name in ours:
        for key in good[name]["inputs"]:
            for wrong in WRONG:
                graph = {**good, name: {**good[name], "inputs": {**good[name]["inputs"], key: wrong}}}
                try:
                    server.wait(server.queue(graph), timeout=60)
                except GraphError as error:
                    refused += 1
                    assert error.class_type == good[name]["class_type"], (key, wrong, str(error)[:300])
                else:
                    ran += 1
    assert refused > 100 and ran  # a number may stand for another, and a text for a seed
    assert server.pid == pid
    again = previews(server, server.run(good))
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
