"""Two layers: `stem/` knows nothing of ComfyUI, and the pack finds its own modules by relative imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OWN = {"stem", "nodes", "tools", "tests", "stem_video_inversion"}
COMFYUI = {
    *("comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras"),
    *("app", "execution", "folder_paths", "latent_preview", "node_helpers", "server", "utils"),
}


def absolute_imports(source: str) -> Iterator[str]:
    """Top-level names of all absolute imports, also those inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_kind_of_import_is_seen():
    source = "import comfy.utils as u\nfrom stem import em\nfrom . import x\ndef f():\n import nodes.types"
    assert list(absolute_imports(source)) == ["comfy", "stem", "nodes"]


@pytest.mark.parametrize("path", files("stem/**/*.py"), ids=relative)
def test_stem_knows_nothing_of_comfyui(path):
    assert not set(absolute_imports(path.read_text(encoding="utf-8"))) & (COMFYUI | OWN)


@pytest.mark.parametrize("path", files("__init__.py", "nodes/**/*.py"), ids=relative)
def test_pack_modules_are_imported_relatively(path):
    assert not set(absolute_imports(path.read_text(encoding="utf-8"))) & OWN
