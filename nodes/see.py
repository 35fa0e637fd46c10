"""Seeing what a basis explains, how good an inversion is, and clips beside each other."""

from comfy_api.latest import io

from ..stem.basis import check_basis
from ..stem.basis_report import basis_chart, basis_text
from ..stem.comparison import compare_clips
from ..stem.inversion_report import check_clips, inversion_chart, inversion_text, measure
from ..stem.trajectory import check_trajectory
from .bridge.basis_view import chosen_level, view_basis
from .bridge.layout import choose_block, read_layout
from .bridge.progress import per_frame
from .settings import CATEGORY, check_numbers, checked_images, named
from .types import StemBasis, StemTrajectory

SEE = f"{CATEGORY}/see"
CLIPS = 4


class STEMBasisPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMBasisPreview",
            display_name="STEM Basis Preview",
            category=SEE,
            description="Shows what the bases of a clip stand for: every patch of the frames gets the colour of the basis that "
            "explains it. A basis keeps its colour over the whole clip, so you see whether it follows what moves.",
            search_aliases=["show basis", "visualise bases", "attention map", "video segmentation", "em bases", "stem basis"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the clip was inverted with (SD1.x, SD2.x, SDXL)."),
                StemBasis.Input("basis", tooltip="From STEM Basis Estimate or STEM Invert Latents."),
                StemTrajectory.Input("trajectory", tooltip="Of the clip, from STEM Invert Latents. One level of it is read."),
                io.Image.Input("images", tooltip="The clip's frames, to be painted over: as many as were inverted, any size."),
                io.String.Input(
                    "block",
                    default="output_8",
                    tooltip='The self-attention block to look into, such as "input_4", "middle_0" or "output_8". The basis '
                    "needs to hold it. Blocks further out have finer patches; on SDXL they end at output_5.",
                ),
                io.Float.Input(
                    "noise_level",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Which of the recorded noise levels to look at: 0 = the cleanest, 1 = the noisiest.",
                ),
                io.Float.Input(
                    "opacity",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much the colours cover the frames. Patches that no basis explains well are covered less.",
                ),
                io.Int.Input(
                    "head",
                    default=0,
                    min=0,
                    max=63,
                    advanced=True,
                    tooltip="The attention head to look at. Every head has bases of its own.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames, painted in the colours of the bases."),
                io.Image.Output(
                    display_name="chart",
                    tooltip="How many bases are alive, how evenly they are used, and how expectation maximisation converged.",
                ),
                io.String.Output(display_name="report", tooltip="The chart's figures as text."),
            ],
        )

    @classmethod
    def execute(cls, model, basis, trajectory, images, block, noise_level, opacity, head) -> io.NodeOutput:
        with named(cls):
            check_numbers(noise_level=noise_level, opacity=opacity)
            images = checked_images("images", images)
            layout = read_layout(model)
            check_trajectory(trajectory, layout.model)
            chosen = choose_block(layout, block)
            check_basis(basis, layout.model)
            check_basis(basis, layout.model, (chosen.name,))
            if head >= chosen.heads:
                raise ValueError(
                    f"head is {head}, and block {chosen.name} has {chosen.heads} heads. Choose 0 to {chosen.heads - 1}."
                )
            frames = trajectory.latents.shape[1]
            if len(images) != frames:
                raise ValueError(
                    f"images has {len(images)} frames, and the trajectory {frames}. Connect the frames of the clip that was "
                    "inverted, all of them."
                )
            level = chosen_level(trajectory, noise_level)
            view = view_basis(model, layout, basis, trajectory, images, chosen, head, level, opacity)
        return io.NodeOutput(view.images, basis_chart(view.figures, view.colours), basis_text(view.figures))


class STEMInversionReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMInversionReport",
            display_name="STEM Inversion Report",
            category=SEE,
            description="Measures an inversion: how near the clip that was sampled back is to its source, how steady it is, "
            "and how much the inverted latents look like noise.",
            search_aliases=["psnr", "ssim", "flicker", "inversion quality", "video metrics", "compare", "measure"],
            inputs=[
                StemTrajectory.Input("trajectory", tooltip="From STEM Invert Latents, by any of its methods."),
                io.Image.Input("source", tooltip="The frames that were inverted."),
                io.Image.Input(
                    "reconstruction",
                    tooltip="The frames that sampling with the source prompt gives back, decoded. Of the source's size.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="plot",
                    tooltip="PSNR and SSIM of every frame, flicker, and the latents of every level beside a unit Gaussian.",
                ),
                io.String.Output(display_name="report", tooltip="The figures as text."),
            ],
        )

    @classmethod
    def execute(cls, trajectory, source, reconstruction) -> io.NodeOutput:
        with named(cls):
            source = checked_images("source", source)
            reconstruction = checked_images("reconstruction", reconstruction)
            check_clips(trajectory, source, reconstruction)
            figures = measure(trajectory, source, reconstruction, per_frame(2 * len(source) - 1 + len(trajectory.sigmas)))
        return io.NodeOutput(inversion_chart(figures), inversion_text(figures))


class STEMCompareVideos(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMCompareVideos",
            display_name="STEM Compare Videos",
            category=SEE,
            description="Puts two to four clips beside each other, each under its name, as frames for Create Video. Clips are "
            "scaled to the height of the first; shorter ones hold their last frame.",
            search_aliases=["side by side", "compare videos", "before after", "grid", "split screen", "concatenate images"],
            inputs=[
                io.Image.Input("images_1", tooltip="The first clip. The others are scaled to its height."),
                io.Image.Input(
                    "images_2", tooltip="The second clip. Where clips differ in length, shorter ones hold their last frame."
                ),
                io.Image.Input("images_3", optional=True, tooltip="A third clip."),
                io.Image.Input("images_4", optional=True, tooltip="A fourth clip."),
                *(
                    io.String.Input(
                        f"label_{number}",
                        default=label,
                        tooltip=f"What stands above clip {number}. Empty: nothing.",
                    )
                    for number, label in enumerate(("source", "edit", "", ""), 1)
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=CLIPS,
                    tooltip="Clips in a row: 0 = all in one row, 1 = one above the other, 2 = a square of four.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="Frames with all clips in them, of an even width and height, as video encoders want.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, images_1, images_2, label_1, label_2, label_3, label_4, columns, images_3=None, images_4=None
    ) -> io.NodeOutput:
        with named(cls):
            given = zip((images_1, images_2, images_3, images_4), (label_1, label_2, label_3, label_4), strict=True)
            pairs = [
                (checked_images(f"images_{number}", clip), label)
                for number, (clip, label) in enumerate(given, 1)
                if clip is not None
            ]
            clips, labels = zip(*pairs, strict=True)
            frames = max(map(len, clips))
            return io.NodeOutput(compare_clips(clips, labels, columns, per_frame(frames)))


NODES = [STEMBasisPreview, STEMInversionReport, STEMCompareVideos]
