"""What is read on the nodes in each language: English is the schemas, and the others say the same."""

import copy
import json
import re

import pytest

from tools import locales


@pytest.fixture(scope="module")
def schemas(pack):
    return [node.define_schema() for node in pack.nodes.NODES]


@pytest.fixture(scope="module")
def source(schemas):
    return locales.english(schemas)


def test_english_is_what_the_schemas_say(schemas, source):
    assert locales.read("en") == source
    nodes = source["nodeDefs"]
    assert set(nodes) == {schema.node_id for schema in schemas}
    for schema in schemas:
        node = nodes[schema.node_id]
        assert (node["display_name"], node["description"]) == (schema.display_name, schema.description)
        assert list(node.get("inputs", {})) == [part.id for part in schema.inputs]
        assert list(node.get("outputs", {})) == [str(i) for i in range(len(schema.outputs))]
        for part, said in zip(schema.outputs, node.get("outputs", {}).values(), strict=True):
            assert said == {"name": part.display_name, "tooltip": part.tooltip}


def test_parts_of_the_category_and_own_sockets_have_a_name(schemas, source):
    """The first part, `video`, is core's own, and core's name for it stays."""
    assert {schema.category.split("/")[0] for schema in schemas} == {"video"}
    assert {part for schema in schemas for part in schema.category.split("/")} == {"video", *source["main"]["nodeCategories"]}
    assert {"STEM_BASIS", "STEM_TRAJECTORY"} <= set(source["main"]["dataTypes"])


def test_nothing_english_is_a_command_of_vue_i18n(source):
    """A | in a name or description would show the part before it alone; tooltips are not read as messages."""
    for key, text in locales.flat(source).items():
        assert key[-1] == "tooltip" or not set(text) & set("{}|@"), key


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_a_translation_has_the_same_keys_and_says_the_same(source, language):
    texts = locales.read(language)
    assert set(locales.flat(texts)) == set(locales.flat(source))
    assert locales.flaws(texts, source, language) == []


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_a_translation_is_in_its_own_script(source, language):
    """Chinese without kana, Japanese with it, Korean without either or Chinese signs; nothing is left in English."""
    english, foreign = locales.flat(source), {"zh": "[\u3040-\u30ff\uac00-\ud7a3]", "ja": "[\uac00-\ud7a3]"}
    foreign["ko"] = "[\u3040-\u30ff\u4e00-\u9fff]"
    for key, text in locales.flat(locales.read(language)).items():
        assert not re.search(foreign[language], text), key
        assert len(english[key].split()) < 4 or text != english[key], key


def test_files_are_written_one_way_only():
    for path in locales.FOLDER.glob("*/*.json"):
        text = path.read_text(encoding="utf-8")
        assert text == json.dumps(json.loads(text), ensure_ascii=False, indent=2) + "\n", path
    assert {path.name for path in locales.FOLDER.iterdir()} == {"en", *locales.LANGUAGES}


@pytest.mark.parametrize(
    ("node", "part", "old", "new", "flaw"),
    [
        ("STEMBasisEstimate", ("inputs", "temperature", "tooltip"), "0.01", "0.1", "without 0.01"),
        ("STEMBasisEstimate", ("inputs", "blocks", "tooltip"), '"output"', '"输出"', 'without "output"'),
        ("STEMTokenFlow", ("inputs", "mode", "tooltip"), "sdedit", "SD 编辑", "without sdedit"),
        ("STEMFateZero", ("inputs", "min_channels", "tooltip"), "previous_first", "前一帧", "without previous_first"),
        (
            "STEMInvertLatents",
            ("outputs", "3", "tooltip"),
            "STEM 模型补丁",
            "补丁",
            "STEM Patch Model is shown as STEM 模型补丁",
        ),
        ("STEMFateZero", ("inputs", "target_prompt", "tooltip"), "源提示词", "提示词", "source_prompt is shown as 源提示词"),
        ("STEMBasisEstimate", ("description",), "关键帧", "图像", "keyframes is 关键帧"),
        ("STEMPatchModel", ("description",), "。", "|", "vue-i18n"),
        ("STEMDemoClip", ("inputs", "colour", "tooltip"), "。", "", "no full stop"),
    ],
)
def test_what_a_translation_loses_is_found(source, node, part, old, new, flaw):
    texts = copy.deepcopy(locales.read("zh"))
    place = texts["nodeDefs"][node]
    for key in part[:-1]:
        place = place[key]
    assert old in place[part[-1]]
    place[part[-1]] = place[part[-1]].replace(old, new)
    assert any(flaw in line for line in locales.flaws(texts, source, "zh"))


def test_missing_stale_empty_and_english_texts_are_found(source):
    texts = copy.deepcopy(locales.read("ko"))
    inputs = texts["nodeDefs"]["STEMDemoClip"]["inputs"]
    inputs["pace"] = inputs.pop("frames")
    inputs["size"]["tooltip"] = ""
    inputs["shape"]["tooltip"] = source["nodeDefs"]["STEMDemoClip"]["inputs"]["shape"]["tooltip"]
    found = "\n".join(locales.flaws(texts, source, "ko"))
    for flaw in ("frames.name: missing", "pace.name: stale", "size.tooltip: empty", "shape.tooltip: not translated"):
        assert f"nodeDefs.STEMDemoClip.inputs.{flaw}" in found


def test_one_text_is_translated_one_way(source):
    texts = copy.deepcopy(locales.read("ja"))
    texts["nodeDefs"]["STEMPatchModel"]["inputs"]["seed"]["tooltip"] = "基底の乱数です。接続した基底は独自の値を持ちます。"
    assert any("elsewhere the same is" in line for line in locales.flaws(texts, source, "ja"))
