import asyncio

import pytest

from tools import comfy
from tools.server import GraphError, GraphInterrupted, Server, ServerError

IMAGE = {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}}
PREVIEW = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}


def pack_node_ids() -> set[str]:
    async def schemas():
        extension = await comfy.start().comfy_entrypoint()
        return [node.GET_SCHEMA() for node in await extension.get_node_list()]

    return {schema.node_id for schema in asyncio.run(schemas())}


def test_every_node_of_the_pack_is_registered(server):
    ids = pack_node_ids()
    assert ids and ids <= server.object_info().keys()


def test_graph_runs_and_tells_its_progress(server):
    seen = []
    entry = server.run({"1": IMAGE, "2": PREVIEW}, on_progress=seen.append)
    assert entry["outputs"]["2"]["images"][0]["type"] == "temp"
    assert [(step.node_id, step.class_type) for step in seen] == [("1", "EmptyImage"), ("2", "PreviewImage")]


def test_refused_graph_names_the_node_and_the_input(server):
    wrong = {"class_type": "EmptyImage", "inputs": IMAGE["inputs"] | {"width": -1}}
    with pytest.raises(GraphError, match="width") as error:
        server.run({"1": wrong, "2": PREVIEW})
    assert (error.value.node_id, error.value.class_type) == ("1", "EmptyImage")


def test_unknown_node_is_refused(server):
    with pytest.raises(GraphError, match="NoSuchNode"):
        server.run({"1": {"class_type": "NoSuchNode", "inputs": {}}, "2": PREVIEW})


def test_graph_valid_in_part_is_refused(server):
    other = {"class_type": "PreviewImage", "inputs": {}}
    with pytest.raises(GraphError, match="images"):
        server.run({"1": IMAGE, "2": PREVIEW, "3": other})


@pytest.mark.parametrize("on_progress", [None, lambda _: None], ids=["waiting", "following"])
def test_failing_graph_names_the_node_and_the_queue_goes_on(server, on_progress):
    inputs = {"image": ["1", 0], "upscale_method": "area", "scale_by": 0.01}
    nothing = {"class_type": "ImageScaleBy", "inputs": inputs}  # 0x0 pixels, which cannot be saved
    preview = {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}}
    with pytest.raises(GraphError) as error:
        server.run({"1": IMAGE, "7": nothing, "8": preview}, on_progress)
    assert (error.value.node_id, error.value.class_type) == ("8", "PreviewImage")
    assert server.run({"1": IMAGE, "2": PREVIEW})["status"]["completed"]


def test_two_servers_of_one_checkout_run_side_by_side(server):
    with Server() as other:
        assert other.port != server.port
        assert other.run({"1": IMAGE, "2": PREVIEW})["status"]["completed"]
    assert server.run({"1": IMAGE, "2": PREVIEW})["status"]["completed"]


def test_server_that_cannot_start_shows_the_end_of_its_log():
    with pytest.raises(ServerError, match="no-such-option"), Server(["--no-such-option"]):
        pass


def test_taken_port_is_told(server):
    with pytest.raises(ServerError, match=f"Port {server.port}"):
        Server(port=server.port)


def test_interrupted_graph_is_told_apart(server):
    def cancel(_):
        server.interrupt()

    many = {
        "class_type": "EmptyImage",
        "inputs": IMAGE["inputs"] | {"width": 512, "height": 512, "batch_size": 16},
    }
    blur = {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "blur_radius": 15, "sigma": 5.0}}
    with pytest.raises(GraphInterrupted):
        server.run({"1": many, "3": blur, "2": PREVIEW | {"inputs": {"images": ["3", 0]}}}, cancel)
