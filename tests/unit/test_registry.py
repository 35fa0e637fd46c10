"""What the ComfyUI registry demands: fields of pyproject.toml, what is in the archive, pictures, and the workflows of GitHub.

Source of the rules: docs.comfy.org/registry/specifications and publishing.
"""

import os
import re
import shutil
import subprocess

import pytest
import tomllib
import yaml
from PIL import Image

from tools import emblem, places

CLASSIFIERS = {"Operating System :: OS Independent", "Environment :: GPU :: NVIDIA CUDA"}
ACTION = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((places.ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def load(workflow):
    return yaml.safe_load((places.ROOT / ".github" / "workflows" / workflow).read_text(encoding="utf-8"))


def test_name_and_version_follow_the_rules(project):
    name, version = project["project"]["name"], project["project"]["version"]
    assert len(name) < 100 and re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*", name)
    assert "comfyui" not in name.lower() and name == places.PACK
    assert re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version)


def test_all_fields_of_the_registry_are_there(project):
    about, registry = project["project"], project["tool"]["comfy"]
    assert about["description"] and CLASSIFIERS <= set(about["classifiers"])
    assert (places.ROOT / about["license"]["file"]).is_file() and (places.ROOT / about["readme"]).is_file()
    assert about["dependencies"] == [], "ComfyUI brings all that the pack needs"
    assert re.fullmatch(r"[a-z0-9-]+", registry["PublisherId"]) and registry["DisplayName"]
    addresses = [about.get("urls", {}).get("Repository"), registry.get("Icon"), registry.get("Banner")]
    assert all(addresses) or not any(addresses), "all three come with the repository's public address"
    assert all(address.startswith("https://") for address in filter(None, addresses))


def test_the_oldest_comfyui_is_the_one_that_set_up_accepts(project):
    oldest = ".".join(map(str, places.OLDEST_COMFYUI))
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={oldest}.0"


@pytest.fixture(scope="module")
def archive():
    """Files that the registry's archive holds: git's, without those that .comfyignore names."""
    git = shutil.which("git")

    def listed(*options):
        done = subprocess.run(
            [git, "-C", places.ROOT, "ls-files", "-z", "--cached", *options], capture_output=True, text=True, check=True
        )
        return set(filter(None, done.stdout.split("\0")))

    return listed() - listed("--ignored", "--exclude-from=.comfyignore")


def test_the_archive_holds_what_runs_and_what_people_see(archive):
    needed = {"__init__.py", "LICENSE", "README.md", "pyproject.toml", "node_list.json"}
    needed |= {"nodes/demo_model.safetensors", "nodes/demo_controlnet.safetensors"}
    for pattern in ("nodes/**/*.py", "stem/*.py", "locales/*/*.json", "web/docs/*", "workflows/*", "subgraphs/*", "doc/*.md"):
        needed |= {path.relative_to(places.ROOT).as_posix() for path in places.ROOT.glob(pattern) if path.is_file()}
    assert needed <= archive


def test_the_archive_holds_nothing_else(archive):
    assert {path.split("/")[0] for path in archive if "/" in path} <= {
        "nodes", "stem", "locales", "web", "workflows", "subgraphs", "doc",
    }  # fmt: skip
    assert not [path for path in archive if path.startswith(".") or path == "Makefile"]


@pytest.mark.parametrize(("name", "design"), [("icon", emblem.ICON), ("banner", emblem.BANNER)])
def test_pictures_are_of_the_sizes_that_the_registry_takes(name, design):
    with Image.open(emblem.FOLDER / f"{name}.png") as picture:
        assert (picture.format, picture.size) == ("PNG", design.size)
    width, height = design.size
    assert (width == height <= 400) if name == "icon" else (width * 9 == height * 21)


def test_the_icon_is_what_its_script_draws():
    """To a hundredth in the mean: the last digits of the arithmetic differ between machines."""
    with Image.open(emblem.FOLDER / "icon.png") as stored:
        drawn = emblem.draw(emblem.ICON)
        differences = [abs(a - b) for a, b in zip(stored.convert("RGB").tobytes(), drawn.tobytes(), strict=True)]
    assert sum(differences) / len(differences) < 2.55


@pytest.mark.parametrize("name", ["test.yml", "publish.yml"])
def test_workflows_can_only_read_and_pin_their_actions(name):
    workflow = load(name)
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and all(ACTION.fullmatch(action) for action in used)
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_every_push_and_pull_request_runs_all_checks():
    workflow = load("test.yml")
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the word on as true
    assert ".ci/run" in [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert (places.ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_a_new_version_on_main_is_published(project):
    workflow = load("publish.yml")
    assert workflow[True]["push"] == {"branches": ["main"], "paths": ["pyproject.toml"]}
    *_, version, publish = workflow["jobs"]["publish"]["steps"]
    assert publish["uses"].startswith("Comfy-Org/publish-node-action@")
    assert "secrets.REGISTRY_ACCESS_TOKEN" in publish["with"]["personal_access_token"]
    assert publish["if"] == f"steps.{version['id']}.outputs.changed == 'true'"
    text = (places.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r"^version = (.*)", text, re.M) == [f'"{project["project"]["version"]}"'], "the one line that is compared"


@pytest.mark.parametrize(("before", "published"), [("", True), ("0" * 40, True), ("HEAD", False)])
def test_a_run_by_hand_and_a_first_push_are_published_and_an_old_version_is_not(tmp_path, before, published):
    *_, version, _ = load("publish.yml")["jobs"]["publish"]["steps"]
    git = [shutil.which("git"), "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / "pyproject.toml").write_text('version = "0.1.0"\n', encoding="utf-8")
    for command in (["init", "-q"], ["add", "pyproject.toml"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    output = tmp_path / "output"
    output.touch()
    environment = os.environ | {"BEFORE": before, "GITHUB_OUTPUT": str(output)}
    subprocess.run([shutil.which("bash"), "-e", "-c", version["run"]], cwd=tmp_path, env=environment, check=True)
    assert output.read_text(encoding="utf-8") == ("changed=true\n" if published else "")
