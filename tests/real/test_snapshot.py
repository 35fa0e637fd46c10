"""Workflows that were shared stay valid: the schemas against the snapshot of tests/schemas.json."""

import copy

import pytest

from tools import schemas

RANKS = {"inputs": "id", "outputs": "name"}


@pytest.fixture(scope="module")
def found(pack):
    return schemas.described(schemas.schemas())


def test_shared_workflows_still_open_and_run(found):
    assert schemas.broken(schemas.stored(), found) == []


def test_snapshot_is_up_to_date(found):
    assert schemas.SNAPSHOT.read_text(encoding="utf-8") == schemas.text(found), "run python -m tools.schemas"


# --- what a wrong schema is told


STORED = {
    "Invert": {
        "inputs": [
            {"id": "model", "type": "MODEL"},
            {"id": "basis", "type": "STEM_BASIS", "optional": True},
            {"id": "steps", "type": "INT", "default": 50, "min": 1, "max": 999},
            {"id": "method", "type": "COMBO", "default": "stem", "options": ["stem", "ddim"]},
            {"id": "strength", "type": "FLOAT", "optional": True, "default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01},
        ],
        "outputs": [{"name": "latents", "type": "LATENT"}, {"name": "sigmas", "type": "SIGMAS"}],
    }
}


def change(name, **what):
    return lambda node: next(given for given in node["inputs"] if given["id"] == name).update(what)


def remove(name):
    return lambda node: node["inputs"].remove(next(given for given in node["inputs"] if given["id"] == name))


def insert(place, **what):
    return lambda node: node["inputs"].insert(place, {"id": "new", "type": "INT", "optional": True, "default": 0, **what})


def options(*names):
    return change("method", options=[*names])


def changed(how):
    new = copy.deepcopy(STORED)
    how(new["Invert"])
    return new


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (remove("steps"), "input steps is gone"),
        (remove("basis"), "input basis is gone"),
        (change("steps", id="levels"), "input steps is gone"),
        (change("steps", type="FLOAT"), "type INT is now FLOAT"),
        (change("steps", min=2), "range 1 to 999 is now 2 to 999"),
        (change("steps", max=998), "range 1 to 999 is now 1 to 998"),
        (change("steps", step=8), "step 1 is now 8"),
        (change("strength", step=0.1), "step 0.01 is now 0.1"),
        (change("strength", optional=False), "it was optional"),
        (change("strength", default=0.4), "default 0.5 is now 0.4"),
        (change("steps", control_after_generate=True), "control_after_generate None is now True"),
        (change("steps", forceInput=True), "forceInput None is now True"),
        (options("stem"), "options stem, ddim are now stem"),
        (options("ddim", "stem"), "options stem, ddim are now ddim, stem"),
        (options("stem", "new", "ddim"), "options stem, ddim are now stem, new, ddim"),
        (insert(5, optional=False), "input new is new and not optional"),
        (insert(2), "widgets are in another order"),
        (insert(0, type="LATENT"), "sockets are in another order"),
        (lambda node: node["inputs"].reverse(), "widgets are in another order"),
        (lambda node: node["outputs"].reverse(), "outputs latents LATENT, sigmas SIGMAS are now sigmas SIGMAS"),
        (lambda node: node["outputs"].pop(), "outputs latents LATENT, sigmas SIGMAS are now latents LATENT"),
        (lambda node: node["outputs"][0].update(name="noise"), "are now noise LATENT"),
        (lambda node: node["outputs"].insert(0, {"name": "basis", "type": "STEM_BASIS"}), "are now basis STEM_BASIS"),
    ],
)
def test_a_change_that_breaks_workflows_is_told(how, told):
    lines = schemas.broken(STORED, changed(how))
    assert any(line.startswith("Invert: ") and told in line for line in lines), lines


@pytest.mark.parametrize(
    "how",
    [
        insert(5),
        insert(2, type="LATENT"),  # behind all sockets: what widgets hold is not moved
        options("stem", "ddim", "new"),
        change("steps", min=0, max=1000, default=20, advanced=True),
        change("strength", step=0.001),
        lambda node: node["outputs"].append({"name": "basis", "type": "STEM_BASIS"}),
    ],
)
def test_what_is_appended_breaks_nothing(how):
    assert schemas.broken(STORED, changed(how)) == []


def test_a_node_may_come_but_not_go():
    assert schemas.broken(STORED, {}) == ["Invert is gone"]
    assert schemas.broken({}, STORED) == []


def test_every_input_and_output_of_the_nodes_is_held(found):
    """A real node that loses one of its parts is told, whichever it is."""
    for name, node in found.items():
        for rank, key in RANKS.items():
            for part in node[rank]:
                less = {**found, name: {**node, rank: [other for other in node[rank] if other is not part]}}
                assert any(part[key] in line for line in schemas.broken(found, less)), (name, part)


def test_options_that_are_files_are_not_held(found):
    for name, given in schemas.FROM_FILES & {(name, i["id"]) for name, node in found.items() for i in node["inputs"]}:
        held = next(i for i in found[name]["inputs"] if i["id"] == given)
        assert "options" not in held and "default" not in held


# --- the command


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(schemas, "SNAPSHOT", tmp_path / "schemas.json")
    return schemas.SNAPSHOT


def test_the_command_writes_what_its_check_agrees_with(elsewhere, found):
    assert schemas.main(["--check"]) == 1 and not elsewhere.exists()
    assert schemas.main([]) == 0 and schemas.stored() == found
    assert schemas.main(["--check"]) == 0
    elsewhere.write_text(elsewhere.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert schemas.main(["--check"]) == 1


def test_the_command_does_not_write_a_change_that_breaks_workflows(elsewhere, found, capsys):
    more = copy.deepcopy(found)
    more["STEMPatchModel"]["inputs"].append({"id": "old", "type": "INT", "default": 0})
    elsewhere.write_text(schemas.text(more), encoding="utf-8")
    assert schemas.main([]) == schemas.main(["--check"]) == 1
    assert schemas.stored() == more
    assert "STEMPatchModel: input old is gone" in capsys.readouterr().err
