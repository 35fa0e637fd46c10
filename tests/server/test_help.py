"""The help pages where the front end looks for them."""

from tools import places
from tools.help import FOLDER


def test_pages_and_pictures_are_served_where_the_front_end_asks(server):
    """It takes the folder's name from the module of the node."""
    module = f"custom_nodes.{places.PACK}"
    nodes = {name for name, kind in server.object_info().items() if kind["python_module"] == module}
    files = sorted(FOLDER.iterdir())
    assert nodes and nodes == {path.stem for path in files if path.suffix == ".md"}
    for path in files:
        assert server.get(f"/extensions/{places.PACK}/docs/{path.name}") == path.read_bytes()
