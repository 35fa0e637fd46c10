"""Texts of the nodes in the languages of the front end.

    python -m tools.locales [--check]

English is the schemas themselves: locales/en is written from them. The other languages are written by hand; what they lack,
what they have too much, and what does not agree with the English text is listed. With --check nothing is written, and a
difference in English counts too.

The front end reads nodeDefs.json (a text for every node, input and output; outputs by their number) and main.json (parts of the
category, types of sockets). Names and descriptions are messages of vue-i18n there, in which { } | @ are commands; tooltips are
shown as they are.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tools import comfy, places

FOLDER = places.ROOT / "locales"
FILES = ("nodeDefs", "main")
LANGUAGES = ("zh", "ja", "ko")
SCRIPT = {  # what a text has that is not a name
    "zh": "[\u4e00-\u9fff]",
    "ja": "[\u3040-\u30ff]",
    "ko": "[\uac00-\ud7a3]",
}
GLOSSARY = {  # a word of the English text: what stands for it, as ComfyUI's own translations have it where they do
    r"bas[ei]s": ("基", "基底", "기저"),
    r"blocks?": ("块", "ブロック", "블록"),
    r"clips?": ("片段", "クリップ", "클립"),
    r"convolutions?": ("卷积", "畳み込み", "합성곱"),
    r"cross-attention": ("交叉注意力", "クロスアテンション", "교차 어텐션"),
    r"expectation maximisation": ("期望最大化", "期待値最大化", "기댓값 최대화"),
    r"frames?": ("帧", "フレーム", "프레임"),
    r"invert(s|ed|ing)?|inversions?": ("反演", "インバージョン", "인버전"),
    r"keyframes?": ("关键帧", "キーフレーム", "키프레임"),
    r"latents": ("Latent", "潜在変数", "잠재 데이터"),
    r"masks?": ("遮罩", "マスク", "마스크"),
    r"noise levels?": ("噪声水平", "ノイズレベル", "노이즈 레벨"),
    r"prompts?": ("提示词", "プロンプト", "프롬프트"),
    r"sampler": ("采样器", "サンプラー", "샘플러"),
    r"self-attention": ("自注意力", "セルフアテンション", "셀프 어텐션"),
    r"trajectory": ("轨迹", "軌跡", "궤적"),
}

TEXT = ("display_name", "description", "tooltip")  # the other keys are names of inputs and outputs

Texts = dict[str, Any]


def english(schemas: Iterable) -> dict[str, Texts]:
    """The files of locales/en, by name.

    Args:
        schemas: Of the nodes, `io.Schema`.
    """
    schemas = list(schemas)
    sockets = {part.io_type for schema in schemas for part in [*schema.inputs, *schema.outputs]}
    parts = {part for schema in schemas for part in schema.category.split("/")[1:]}  # the first is one of core's own
    return {
        "nodeDefs": {_key(schema.node_id): _node(schema) for schema in schemas},
        "main": {
            "nodeCategories": {part: part for part in sorted(parts)},
            "dataTypes": {type_: type_ for type_ in sorted(sockets) if type_.startswith("STEM_")},
        },
    }


def _node(schema) -> Texts:
    texts = {"display_name": schema.display_name, "description": schema.description}
    if schema.inputs:
        texts["inputs"] = {
            _key(part.id): {"name": part.display_name or part.id, "tooltip": part.tooltip} for part in schema.inputs
        }
    if schema.outputs:
        texts["outputs"] = {
            str(i): {"name": part.display_name, "tooltip": part.tooltip} for i, part in enumerate(schema.outputs)
        }
    return texts


def _key(id_: str) -> str:
    return id_.replace(".", "_")


def read(language: str) -> dict[str, Texts]:
    return {name: json.loads((FOLDER / language / f"{name}.json").read_text(encoding="utf-8")) for name in FILES}


def write(language: str, texts: dict[str, Texts]) -> None:
    (FOLDER / language).mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        written = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (FOLDER / language / f"{name}.json").write_text(written, encoding="utf-8")


def flat(texts: Texts, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """All texts by the keys that lead to them."""
    found = {}
    for key, value in texts.items():
        found |= flat(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


def flaws(texts: dict[str, Texts], source: dict[str, Texts], language: str) -> list[str]:
    """What is wrong with a translation, a line for each; nothing where it is right.

    Args:
        texts: The files of a language.
        source: The English ones.
        language: One of `LANGUAGES`.
    """
    own, wanted = flat(texts), flat(source)
    found = [f"{'.'.join(key)}: missing" for key in wanted if key not in own]
    found += [f"{'.'.join(key)}: stale" for key in own if key not in wanted]
    terms = [(re.compile(rf"(?<![\w-])({term})(?![\w-])"), said) for term, said in GLOSSARY.items()]
    spoken = [(term, said[LANGUAGES.index(language)]) for term, said in terms]
    names = dict(_names(source, texts))
    first = {}
    for key in [key for key in wanted if key in own]:
        said = own[key]
        found += [f"{'.'.join(key)}: {flaw}: {said}" for flaw in _form(key, said, language)]
        if key[-1] in TEXT:
            if first.setdefault(wanted[key], said) != said:
                found.append(f"{'.'.join(key)}: elsewhere the same is {first[wanted[key]]}: {said}")
            found += [f"{'.'.join(key)}: {flaw}: {said}" for flaw in _content(wanted[key], said, spoken, names)]
    return found


def _names(source: dict[str, Texts], texts: dict[str, Texts]) -> Iterator[tuple[str, str]]:
    """How names of nodes and inputs that a text can mention are shown: a word with _ is an input for certain."""
    for id_, node in source["nodeDefs"].items():
        shown = texts["nodeDefs"].get(id_, {})
        yield node["display_name"], shown.get("display_name", "")
        for input_, part in node.get("inputs", {}).items():
            if "_" in input_:
                yield part["name"], shown.get("inputs", {}).get(input_, {}).get("name", "")


def _form(key: tuple[str, ...], said: str, language: str) -> Iterator[str]:
    if not isinstance(said, str) or not said or said != said.strip():
        yield "empty, or space at an end"
    elif key[-1] in TEXT[1:]:
        if not re.search(SCRIPT[language], said):
            yield "not translated"
        if said[-1] not in ".。":
            yield "no full stop"
    if key[-1] != "tooltip" and set(str(said)) & set("{}|@"):
        yield "has a sign that vue-i18n reads as a command"


def _content(text: str, said: str, terms: list[tuple[re.Pattern, str]], names: dict[str, str]) -> Iterator[str]:
    """What the English text has and the translation has not."""
    quoted = re.findall(r'"[^"]+"|%\w+%', text)
    plain = re.sub(r'"[^"]+"', "", text)
    for name in sorted(names, key=len, reverse=True):
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", plain):
            plain = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "", plain)
            if names[name] not in said:
                yield f"{name} is shown as {names[name]}"
    choices = re.findall(r"(?:^|[.:] )([a-z_0-9]+)(?=: )", plain) + re.findall(r"\b[a-z0-9]+_[a-z_0-9]+\b", plain)
    figures = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)|\b[a-z]+\d+\b", plain)
    proper = re.findall(r"\b[A-Z]+[A-Z0-9][\w.]*\b|\b[A-Z][a-z]+[A-Z]\w*", plain)
    for kept in dict.fromkeys([*quoted, *choices, *figures, *proper]):
        if not re.search(rf"(?<![\w.]){re.escape(kept)}(?!\w|\.\d)", said, re.ASCII):
            yield f"without {kept}"
    plain = re.sub(r"\b[A-Z](?=[a-z])", lambda first: first[0].lower(), plain)  # at the start of a sentence
    for term, needed in terms:
        if term.search(plain) and needed not in said:
            yield f"{term.search(plain)[0]} is {needed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    source = english(node.define_schema() for node in comfy.start().nodes.NODES)
    found = []
    if not args.check:
        write("en", source)
    elif read("en") != source:
        found.append("en: differs from the schemas; run python -m tools.locales")
    for language in LANGUAGES:
        found += [f"{language} {flaw}" for flaw in flaws(read(language), source, language)]
    print("\n".join(found) or f"{len(flat(source))} texts in each of en, {', '.join(LANGUAGES)}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
