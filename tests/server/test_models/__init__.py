"""A node pack for the server tests alone: models of other families, a random ControlNet, and a LATENT without frames."""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from comfy_api.latest import ComfyExtension, io

LAYOUTS = ["sd2", "sdxl", "svd", "dit"]


class STEMTestModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMTestModel",
            category="testing",
            inputs=[io.Combo.Input("layout", options=LAYOUTS)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, layout: str) -> io.NodeOutput:
        return io.NodeOutput(_tiny_models().tiny_model(layout))


class STEMTestControlNet(io.ComfyNode):
    """Random weights, in the layout of a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMTestControlNet",
            category="testing",
            inputs=[io.Model.Input("model")],
            outputs=[io.ControlNet.Output()],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        models, sizes = _tiny_models(), model.model.model_config.unet_config
        return io.NodeOutput(models.tiny_controlnet(unet={name: sizes[name] for name in models.SD1}))


class STEMTestEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="STEMTestEmptyLatent", category="testing", inputs=[], outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput({"samples": torch.zeros(0, 4, 8, 8)})


class TestModels(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [STEMTestModel, STEMTestControlNet, STEMTestEmptyLatent]


async def comfy_entrypoint() -> TestModels:
    return TestModels()


def _tiny_models() -> ModuleType:
    """The models of the tests that run in process."""
    path = Path(__file__).parents[2] / "real" / "models.py"
    spec = importlib.util.spec_from_file_location("stem_test_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
