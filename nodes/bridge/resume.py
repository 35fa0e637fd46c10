"""An inversion that was broken off goes on from its last whole level: a file for each in ComfyUI's output folder.

A file holds the latents of its level as they are computed with, and what the run recorded of bases there. It also holds a
digest of all that the run depends on: the graph before the node with the files that it names, and the numbers that reach the
node.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_execution.graph_utils import is_link
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ...stem.archive import Archive, open_archive, read_tensor, write_archive
from ...stem.basis import Basis
from ...stem.plain import pack
from ...stem.strict_json import parse_json, quoted
from .record import BasisRecord

FOLDER = "stem/resume"  # in the output folder
ENDING = ".stem-level.safetensors"
KIND, DIGEST, RECORD = "stem.kind", "stem.digest", "stem.record"
LATENTS = "latents"
REMEDY = 'Choose one such as "my clip".'


class Resume:
    """What is kept of one inversion while it runs."""

    def __init__(self, name: str, digest: str):
        """
        Args:
            name: Of the inversion; a folder of this name holds its files.
            digest: Of all that it depends on.

        Raises:
            ValueError: A name that leads out of the folder.
        """
        root = os.path.join(folder_paths.get_output_directory(), FOLDER)
        self.folder = Path(root, name)
        inside = self.folder.parent == Path(root) and folder_paths.is_within_directory(root, str(self.folder))
        if not inside or name != name.strip() or name.startswith(".") or len(name) > 100 or not name.isprintable():
            raise ValueError(f"resume {quoted(name)} is no name of a folder. {REMEDY}")
        self.name, self.digest = name, digest

    def restore(self, record: BasisRecord, start: Tensor, levels: int) -> Iterator[Tensor]:
        """Latents like `start`, of level 1 and those that follow, as far as they were kept; the record is as it was there.

        Args:
            record: Of the run, empty.
            start: (f, c, height, width), the latents of level 0.
            levels: How many follow it.
        """
        known = self._of_this_run()
        count = next((level for level in range(levels) if level + 1 not in known), levels)
        for level in known.keys() - range(count + 1):
            known[level].path.unlink()
        if count:
            logging.info(f'STEM: the inversion "{self.name}" goes on after level {count} of {levels}.')
        for level in range(1, count + 1):
            archive = known[level]
            latents = read_tensor(archive, LATENTS)
            if latents.shape != start.shape or latents.dtype != start.dtype:
                raise ValueError(f"{archive.path} does not fit the clip. Remove the folder {self.folder}.")
            record.restore(level - 1, parse_json(archive.metadata[RECORD]), lambda name, a=archive: read_tensor(a, name))
            yield latents.to(start.device)

    def keep(self, record: BasisRecord, level: int, latents: Tensor) -> None:
        """Writes a level, whole or not at all.

        Raises:
            OSError: The disk refuses it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        document, tensors = record.state(level - 1)
        metadata = {KIND: "level", DIGEST: self.digest, RECORD: json.dumps(document)}
        write_archive([self._file(level)], metadata, {LATENTS: latents, **tensors}, lambda _: None)

    def finish(self) -> None:
        """The inversion is done: its files are not needed any more."""
        for file in self.folder.glob(f"*{ENDING}"):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else
            self.folder.rmdir()

    def _of_this_run(self) -> dict[int, Archive]:
        """Files by their levels; what is of another run is removed, and that is told."""
        known, others = {}, 0
        for file in sorted(self.folder.glob(f"*{ENDING}")):
            with suppress(ValueError):
                archive = open_archive(file)
                if archive.metadata.get(DIGEST) == self.digest and LATENTS in archive.entries:
                    known[int(file.name.removesuffix(ENDING))] = archive
                    continue
            file.unlink(missing_ok=True)
            others += 1
        if others:
            logging.warning(
                f'STEM: {others} kept levels of the inversion "{self.name}" are of other inputs or damaged; they are removed, '
                f"and it {'goes on without them' if known else 'starts anew'}."
            )
        return known

    def _file(self, level: int) -> Path:
        return self.folder / f"{level:04}{ENDING}"


def digest_of(dynprompt: Any, samples: Tensor, positive: list, basis: Basis | None, model: tuple, settings: tuple) -> str:
    """Hexadecimal digest of what an inversion depends on.

    Args:
        dynprompt: The graph that is being executed, of which the part before the executing node counts.
        samples: (f, c, height, width).
        positive: Conditioning. What cannot be written as numbers (a ControlNet, hooks) is told by the graph.
        basis: That is connected.
        model: Fingerprint of the model; its weights are told by the graph, and by size and time of the files it names.
        settings: Of the node.

    Raises:
        ValueError: There is no graph to tell the model by.
    """
    context = get_executing_context()
    if dynprompt is None or context is None:
        raise ValueError("resume needs a workflow that ComfyUI executes, to know the model by. Leave it empty.")
    digest = hashlib.blake2b(digest_size=32)
    links = dynprompt.get_node(context.node_id)["inputs"]
    links = {name: value for name, value in links.items() if is_link(value)}
    for part in (_graph(dynprompt, links), model, settings, _numbers(positive)):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    for tensor in (samples, *((basis.sigmas, *basis.keys, *basis.values) if basis is not None else ())):
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _graph(dynprompt: Any, links: Mapping[str, Any]) -> list:
    """Classes and values of all nodes that inputs come from; nodes are called by the order in which they are found."""
    order: dict[str, int] = {}

    def number(node: str) -> int:
        return order.setdefault(node, len(order))

    found = [[name, number(value[0]), value[1]] for name, value in sorted(links.items())]
    seen = 0
    while seen < len(order):
        node = dynprompt.get_node(list(order)[seen])
        inputs = {
            name: ["link", number(value[0]), value[1]] if is_link(value) else [value, _stamps(value)]
            for name, value in sorted(node["inputs"].items())
        }
        found.append([node["class_type"], inputs])
        seen += 1
    return found


def _stamps(value: Any) -> list[list[int]]:
    """Size and time of the files that a text may name: models, and files of the input and output folders."""
    if not isinstance(value, str) or not value or len(value) > 255 or "\0" in value:
        return []
    paths = [folder_paths.get_full_path(kind, value) for kind in list(folder_paths.folder_names_and_paths)]
    with suppress(ValueError):
        paths.append(folder_paths.get_annotated_filepath(value))
    stats = [os.stat(path) for path in sorted({path for path in paths if path and os.path.isfile(path)})]
    return [[each.st_size, each.st_mtime_ns] for each in stats]


def _numbers(conditioning: list) -> list:
    """Of every option what can be written, tensors as digests."""
    found = []
    for text, options in conditioning:
        for name, value in [("", text), *sorted(options.items())]:
            tensors: dict[str, Tensor] = {}
            with suppress(ValueError):
                plain = pack(value, "x", tensors)
                found.append([name, plain, [hashlib.blake2b(_bytes(tensor)).hexdigest() for tensor in tensors.values()]])
    return found


def _bytes(tensor: Tensor) -> bytes:
    """Type, shape and numbers."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + flat.numpy().tobytes()
