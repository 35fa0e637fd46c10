"""What the registry demands of the pack's code, and SECURITY.md promises: no evaluation, network, processes or pickle."""

import ast

import pytest

from tools import places

SHIPPED = sorted([places.ROOT / "__init__.py", *(places.ROOT / "nodes").rglob("*.py"), *(places.ROOT / "stem").rglob("*.py")])
MODULES = {
    "aiohttp", "cloudpickle", "code", "ctypes", "dill", "ftplib", "http", "importlib", "joblib", "marshal", "multiprocessing",
    "pickle", "pip", "pty", "requests", "shelve", "smtplib", "socket", "subprocess", "telnetlib", "urllib", "webbrowser",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input", "open_code"}
METHODS = {("torch", "load"), ("torch", "save"), ("os", "system"), ("os", "popen"), ("os", "execv"), ("os", "fork")}


def found_in(source):
    """Names of what is not allowed in a Python source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in MODULES:
            yield node.module
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in CALLS:
                yield called.id
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                yield from [f"{called.value.id}.{called.attr}"] * ((called.value.id, called.attr) in METHODS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(places.ROOT)))
def test_nothing_that_is_not_allowed_ships(path):
    assert not list(found_in(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import urllib.request as r", "from subprocess import run", "eval('1')", "torch.load(p)",
        "import os\nos.system('x')", "def f():\n    import socket", "from http.client import HTTPConnection",
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_found(source):
    assert list(found_in(source))
