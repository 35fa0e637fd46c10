"""Where saved inversions and bases are: nothing outside ComfyUI's output and input folders is written or read."""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.supported_models_base
import comfy.utils
import folder_paths
from comfy.cli_args import args

from ...stem.plain import pack
from ...stem.saved import Parts, write_parts
from ...stem.strict_json import quoted

INVERSION, BASIS = ".stem.safetensors", ".stem-basis.safetensors"
"""Ends of file names, by which the lists of the nodes know what is in a file without opening it."""

FOLDERS = {"output": folder_paths.get_output_directory, "input": folder_paths.get_input_directory}

LONGEST, LONGEST_PART = 200, 150
"""Of a prefix: letters, and bytes between slashes; disks take 255, and numbers and endings come behind it."""

REMEDIES = {
    "control": "Invert with the prompt alone, and put the ControlNet on the edit's prompt only.",
    "hooks": "Invert with a prompt without hooks, and put them on the edit's prompt only.",
    "gligen": "Take GLIGEN off the prompt of the inversion.",
}
"""What to do where an option of a conditioning cannot be stored."""


class Saved(NamedTuple):
    """A file that was written."""

    file: str  # its name, as core annotates it: "stem/clip_00001_.stem.safetensors [output]"
    size: int  # bytes


def saved_files(ending: str) -> list[str]:
    """Names of the files of one kind in the output and input folders, as core annotates them."""
    found = []
    for kind, folder in FOLDERS.items():
        root = Path(folder())
        found += [f"{path.relative_to(root).as_posix()} [{kind}]" for path in sorted(_walk(root, ending))]
    return found


def saved_file(file: str, ending: str) -> Path:
    """A file by the name that a node was given.

    Raises:
        ValueError: There is no such file in the output or input folder, or it is of another kind.
    """
    if not isinstance(file, str):
        raise ValueError(f"file is {quoted(file)}, and no name. Choose one of the list.")
    name, folder = folder_paths.annotated_filepath(file)
    if folder not in (None, *(each() for each in FOLDERS.values())) or not name.endswith(ending):
        raise ValueError(
            f"{quoted(file)} is no name of a *{ending} file in the output or input folder. Choose one of the list."
        )
    if not folder_paths.exists_annotated_filepath(file):
        raise ValueError(f"{quoted(file)} is not there. Choose a file of the list, or save it again.")
    return Path(folder_paths.get_annotated_filepath(file))


def save_parts(parts: Parts, prefix: str, ending: str, described: Mapping[str, str]) -> Saved:
    """Writes a new file into the output folder, named as core names its own.

    Args:
        parts: Of the file.
        prefix: Of the name.
        ending: Of the name.
        described: More texts for its metadata.

    Raises:
        ValueError: A prefix that leads out of the folder, no room, or parts that do not fit together.
        OSError: The disk refuses it.
    """
    root, asked = folder_paths.get_output_directory(), Path(os.path.normpath(prefix))
    hidden = not asked.name or any(part.startswith(".") for part in asked.parts)
    if hidden or asked.is_absolute() or not folder_paths.is_within_directory(root, os.path.join(root, asked)):
        raise ValueError(
            f"filename_prefix {quoted(prefix)} is no name in ComfyUI's output folder. Choose one such as "
            f'"stem/{parts.metadata["stem.kind"]}".'
        )
    if len(prefix) > LONGEST or any(len(part.encode()) > LONGEST_PART for part in asked.parts):
        raise ValueError(
            f"filename_prefix {quoted(prefix)} is too long. Take at most {LONGEST} letters, and {LONGEST_PART} bytes "
            "between slashes."
        )
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root)
    size = sum(tensor.dtype.itemsize * tensor.shape.numel() for tensor in parts.tensors.values())
    if (free := shutil.disk_usage(folder).free) < size:
        raise ValueError(f"the file takes {size / 1e6:.0f} MB, and {folder} has {free / 1e6:.0f} MB left. Free space there.")
    progress = comfy.utils.ProgressBar(size)

    def pause(written: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(min(written, size))

    names = (Path(folder, f"{name}_{number:05}_{ending}") for number in count(counter))  # another server may save too
    file = write_parts(names, parts, described, pause)
    written = file.stat().st_size
    logging.info(f"STEM: {file.name} written, {written / 1e6:.1f} MB.")
    return Saved(f"{Path(subfolder, file.name).as_posix()} [output]", written)


def check_conditioning(conditioning: list) -> None:
    """
    Raises:
        ValueError: Something in it cannot be stored in a file; names the option and says what to do.
    """
    for _, options in conditioning:
        for name, value in options.items():
            try:
                pack(value, name, {})
            except ValueError as error:
                remedy = REMEDIES.get(name, "Take the node off that adds it to the prompt of the inversion.")
                raise ValueError(f'the prompt of the trajectory has "{name}": {error} {remedy}') from error


def descriptions(hidden: Any, family: str, source: str) -> dict[str, str]:
    """What a file says about itself for people and other programs; of it, nothing is read again.

    Args:
        hidden: Of the node that saves: workflow and the node's own place in it.
        family: Of the model.
        source: Name of the input that leads to the node that made what is saved.
    """
    found = {"stem.latent_format": json.dumps(_latent_format(family))}
    if args.disable_metadata or hidden is None:
        return found
    if hidden.prompt is not None:
        found["prompt"] = json.dumps(hidden.prompt)
        found["stem.prompts"] = json.dumps(prompts_before(hidden.prompt, hidden.unique_id, source))
    for name, value in (hidden.extra_pnginfo or {}).items():
        found[name] = json.dumps(value)
    return found


def prompts_before(graph: Mapping[str, Any], node: str, source: str) -> list[str]:
    """Texts that are written in the nodes on the way to the source prompt of an inversion, in the order they are found.

    Args:
        graph: In the form of the API.
        node: Whose input leads to the inversion.
        source: Name of that input.
    """
    makers = [each for each in _before(graph, node, source) if "positive" in graph[each]["inputs"]]
    texts = []
    for each in _before(graph, makers[0], "positive") if makers else ():
        for name, value in graph[each]["inputs"].items():
            if "text" in name or "prompt" in name:
                written = [graph[one]["inputs"].values() for one in _before(graph, each, name)]  # where it comes by a link
                texts += [text for text in (value, *chain(*written)) if isinstance(text, str)]
    return list(dict.fromkeys(texts))


def _before(graph: Mapping[str, Any], node: str, source: str) -> list[str]:
    """Numbers of the nodes that an input depends on, nearest first."""
    links = [graph.get(node, {}).get("inputs", {}).get(source)]
    found = []
    for link in links:
        if isinstance(link, list) and len(link) == 2 and link[0] in graph and link[0] not in found:
            found.append(link[0])
            links += graph[link[0]]["inputs"].values()
    return found


def _latent_format(family: str) -> dict[str, Any]:
    """Of a family of models, which is named by its class in core."""
    known = [comfy.supported_models_base.BASE]
    for each in known:
        known += each.__subclasses__()
    latents = next((each.latent_format for each in known if each.__name__ == family), None)
    if latents is None:
        return {"family": family}
    format_ = latents()
    return {"name": latents.__name__, "channels": format_.latent_channels, "scale": getattr(format_, "scale_factor", None)}


def _walk(folder: Path, ending: str) -> Iterator[Path]:
    """Ordinary files, in visible folders; links are left out, as core follows none out of its folders."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            if name.endswith(ending) and not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path
