"""STEM Video Inversion: the noise that a video came from, found as one, for the video editors of ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES

WEB_DIRECTORY = "./web"  # help pages; ComfyUI serves the folder under /extensions/


class StemVideoInversion(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> StemVideoInversion:
    return StemVideoInversion()
