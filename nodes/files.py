"""Inversions and bases in files: made once, used in later sessions and other graphs."""

from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..stem.saved import Inversion, load_basis, load_inversion, parts_of_basis, parts_of_inversion
from .bridge.files import (
    BASIS,
    INVERSION,
    Saved,
    check_conditioning,
    descriptions,
    save_parts,
    saved_file,
    saved_files,
)
from .bridge.naming import named_by
from .settings import CATEGORY
from .types import StemBasis, StemTrajectory

FILES = f"{CATEGORY}/files"
PREFIX = (
    "Name of the file in ComfyUI's output folder; a number is added, so no file is overwritten. A slash makes a subfolder, "
    "%year%, %month%, %day% and the like are filled in."
)
CHOICE = "Saved {} in ComfyUI's output and input folders, and the folders in them. Loaded anew only when the file changes."


class STEMSaveInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMSaveInversion",
            display_name="STEM Save Inversion",
            category=FILES,
            description="Writes what STEM Invert Latents found to one safetensors file in ComfyUI's output folder, so that the "
            "clip need not be inverted again. STEM Load Inversion gives it back bit by bit.",
            search_aliases=["save inversion", "export inversion", "save trajectory", "save noise", "keep inversion"],
            inputs=[
                io.Latent.Input("latents", tooltip="The inverted noise, from STEM Invert Latents."),
                StemTrajectory.Input(
                    "trajectory",
                    tooltip="From the same STEM Invert Latents. Its prompt goes into the file as numbers; a ControlNet or "
                    "hooks on that prompt cannot be stored and are refused.",
                ),
                StemBasis.Input(
                    "basis",
                    optional=True,
                    tooltip="The bases of the inversion, where an editor reads them. They can be larger than the rest. Methods "
                    "other than stem have none: leave it unplugged.",
                ),
                io.String.Input("filename_prefix", default="stem/inversion", tooltip=PREFIX),
            ],
            outputs=[
                io.String.Output(display_name="file", tooltip="Name of the file, as STEM Load Inversion lists it."),
            ],
            hidden=[io.Hidden.unique_id],  # prompt and extra_pnginfo are there for every output node
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latents, trajectory, filename_prefix, basis=None) -> io.NodeOutput:
        with named_by("STEMSaveInversion"):
            check_conditioning(trajectory.conditioning)
            parts = parts_of_inversion(Inversion(latents, trajectory, basis))
            described = descriptions(cls.hidden, trajectory.model.family, "trajectory")
            return _told(save_parts(parts, filename_prefix, INVERSION, described))


class STEMLoadInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMLoadInversion",
            display_name="STEM Load Inversion",
            category=FILES,
            description="Gives back what STEM Save Inversion wrote, as if STEM Invert Latents had just run. The trajectory "
            "stays in the file, and editors read one or two noise levels at a time: leave it there until they are done.",
            search_aliases=["load inversion", "import inversion", "load trajectory", "load noise", "saved inversion"],
            inputs=[
                io.Combo.Input("file", options=saved_files(INVERSION), tooltip=CHOICE.format("inversions")),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latents",
                    tooltip="The inverted noise, for a sampler that adds none and starts at the first of the SIGMAS.",
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="Noise levels for sampling from this noise, highest first."),
                StemTrajectory.Output(display_name="trajectory", tooltip="The latents of every noise level, for the editors."),
                StemBasis.Output(
                    display_name="basis", tooltip="The bases that were saved with it, if any, for STEM Patch Model."
                ),
            ],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        with named_by("STEMLoadInversion"):
            latents, trajectory, basis = load_inversion(saved_file(file, INVERSION))
        if basis is None:
            basis = ExecutionBlocker(
                f"STEMLoadInversion: {file} was saved without a basis. Save it with one, or unplug this output."
            )
        return io.NodeOutput(latents, trajectory.sigmas.flip(0), trajectory, basis)

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return _problem(file, INVERSION)

    @classmethod
    def fingerprint_inputs(cls, file=None) -> list:
        return _fingerprint(file, INVERSION)


class STEMSaveBasis(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMSaveBasis",
            display_name="STEM Save Basis",
            category=FILES,
            description="Writes the bases of a clip to one safetensors file in ComfyUI's output folder. STEM Load Basis gives "
            "them back bit by bit.",
            search_aliases=["save basis", "export basis", "save bases", "keep basis"],
            inputs=[
                StemBasis.Input("basis", tooltip="From STEM Basis Estimate or STEM Invert Latents."),
                io.String.Input("filename_prefix", default="stem/basis", tooltip=PREFIX),
            ],
            outputs=[
                io.String.Output(display_name="file", tooltip="Name of the file, as STEM Load Basis lists it."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, basis, filename_prefix) -> io.NodeOutput:
        with named_by("STEMSaveBasis"):
            described = descriptions(cls.hidden, basis.model.family, "basis")
            return _told(save_parts(parts_of_basis(basis), filename_prefix, BASIS, described))


class STEMLoadBasis(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMLoadBasis",
            display_name="STEM Load Basis",
            category=FILES,
            description="Gives back the bases that STEM Save Basis wrote, for a model of the same family and layout.",
            search_aliases=["load basis", "import basis", "load bases", "saved basis"],
            inputs=[
                io.Combo.Input("file", options=saved_files(BASIS), tooltip=CHOICE.format("bases")),
            ],
            outputs=[
                StemBasis.Output(display_name="basis", tooltip="For STEM Invert Latents, STEM Patch Model or another reader."),
            ],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        with named_by("STEMLoadBasis"):
            return io.NodeOutput(load_basis(saved_file(file, BASIS)))

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return _problem(file, BASIS)

    @classmethod
    def fingerprint_inputs(cls, file=None) -> list:
        return _fingerprint(file, BASIS)


def _told(saved: Saved) -> io.NodeOutput:
    return io.NodeOutput(saved.file, ui=ui.PreviewText(f"{saved.file}\n{saved.size / 1e6:.1f} MB"))


def _problem(file: Any, ending: str) -> bool | str:
    """For core, which looks into the list no more where a node validates an input itself: files may have come since."""
    if file is None:  # a link, of which the value is not known yet
        return True
    if not isinstance(file, str):
        return "the name of a file is needed. Choose one of the list."
    try:
        saved_file(file, ending)
    except ValueError as error:
        return str(error)
    return True


def _fingerprint(file: str | None, ending: str) -> list:
    """What changes with the file, by which core knows whether to load it again."""
    if file is None:
        return []
    path = saved_file(file, ending)
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]


NODES = [STEMSaveInversion, STEMLoadInversion, STEMSaveBasis, STEMLoadBasis]
