"""The languages as the front end asks the running server for them."""

import pytest

from tools import locales, places


@pytest.mark.parametrize("language", ["en", *locales.LANGUAGES])
def test_the_server_gives_the_texts_of_every_node(server, language):
    given, own = server.get("/i18n")[language], locales.read(language)
    ours = {id_ for id_, node in server.object_info().items() if node["python_module"] == f"custom_nodes.{places.PACK}"}
    assert ours == set(own["nodeDefs"])
    for id_, texts in own["nodeDefs"].items():
        assert given["nodeDefs"][id_] == texts
    for part, names in own["main"].items():
        assert given[part].items() >= names.items()


def test_inputs_and_outputs_are_named_by_the_keys_that_the_front_end_looks_up(server):
    """nodeDefs.<id>.inputs.<input>.name and nodeDefs.<id>.outputs.<number>.name."""
    given, info = server.get("/i18n"), server.object_info()
    for language in ("en", *locales.LANGUAGES):
        for id_ in locales.read(language)["nodeDefs"]:
            node, texts = info[id_], given[language]["nodeDefs"][id_]
            inputs = [key for section in ("required", "optional") for key in node["input_order"].get(section, [])]
            assert set(texts.get("inputs", {})) == {key.replace(".", "_") for key in inputs}
            assert set(texts.get("outputs", {})) == {str(i) for i in range(len(node["output"]))}
