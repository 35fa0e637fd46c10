"""The parts of the demo that need no server: its graphs, its pictures, its figures."""

import io

import av
import pytest
import torch
from einops import rearrange
from torchvision.transforms.functional import pil_to_tensor

from stem.metrics import psnr
from stem.scenes import caption, edit_scene
from tools.demo import BAR, CLEAR, EDIT_COLOUR, GRAPHS, Result, compare, load_graph, progress_bar, scene_of, summary, table
from tools.pictures import BAND, GAP, SCALE, contact_sheet, save_video, side_by_side, thumbnail
from tools.server import Progress

COLOURS = {"first": (1.0, 0.0, 0.0), "second": (0.0, 1.0, 0.0), "third": (0.0, 0.0, 1.0)}


@pytest.fixture
def clips():
    """Three clips of 5 frames of 32x24 pixels, each of one colour that grows from black to full."""
    light = torch.linspace(0, 1, 5).reshape(-1, 1, 1, 1)
    return {name: (light * torch.tensor(colour)).expand(5, 24, 32, 3) for name, colour in COLOURS.items()}


# ----------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("path", sorted(GRAPHS.glob("*.json")), ids=lambda path: path.stem)
def test_links_of_a_graph_lead_to_its_nodes(path):
    graph = load_graph(path.stem)
    links = [value for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert links and {node_id for node_id, _ in links} <= graph.keys()


def test_edit_changes_the_colour_and_nothing_else():
    graph = load_graph("edit")
    source = scene_of(graph["clip"])
    assert source.figures[0].colour != EDIT_COLOUR
    assert caption(edit_scene(source, colour=EDIT_COLOUR)) == graph["edited"]["inputs"]["text"]


def test_edit_inverts_as_the_reconstruction_does():
    """So that the server takes the inversion from its cache."""
    reconstruct, edit = load_graph("reconstruct"), load_graph("edit")
    for node_id in ("demo", "clip", "encode", "positive", "invert", "patch"):
        assert edit[node_id] == reconstruct[node_id]


def test_steps_are_set_in_every_node_that_has_them():
    graph = load_graph("long_clip", steps=7)
    assert [node["inputs"]["steps"] for node in graph.values() if "steps" in node["inputs"]] == [7, 7]


# --------------------------------------------------------------------------------------------------- pictures


def test_every_frame_is_shown_with_all_clips_side_by_side(clips):
    pictures = side_by_side(clips)
    assert len(pictures) == 5
    assert pictures[0].size == (3 * SCALE * 32 + 2 * GAP, BAND + SCALE * 24)
    for column, colour in enumerate(COLOURS.values()):
        at = column * (SCALE * 32 + GAP) + SCALE * 16, BAND + SCALE * 12
        assert pictures[0].getpixel(at) == (0, 0, 0)
        assert pictures[4].getpixel(at) == tuple(int(255 * c) for c in colour)


def test_clips_are_labelled(clips):
    labels = side_by_side(clips)[0].crop((0, 0, 3 * SCALE * 32, BAND))
    unnamed = side_by_side({" " * i: clip for i, clip in enumerate(clips.values(), 1)})[0]
    assert labels.tobytes() != unnamed.crop((0, 0, 3 * SCALE * 32, BAND)).tobytes()


@pytest.mark.parametrize(("width", "columns"), [(2000, 5), (240, 2), (1, 1)])
def test_contact_sheet_has_a_row_for_each_clip_and_frames_from_the_first_to_the_last(clips, width, columns):
    sheet, narrow, cell = contact_sheet(clips, width), contact_sheet(clips, width=1), SCALE * 32 + GAP
    assert sheet.width == narrow.width + (columns - 1) * cell
    assert sheet.height == BAND + 3 * (SCALE * 24 + GAP)
    first, last = narrow.width - cell + SCALE * 16, sheet.width - cell + SCALE * 16
    for row, colour in enumerate(COLOURS.values()):
        y = BAND + row * (SCALE * 24 + GAP) + SCALE * 12
        assert sheet.getpixel((first, y)) == (0, 0, 0)
        assert columns == 1 or sheet.getpixel((last, y)) == tuple(int(255 * c) for c in colour)


@pytest.mark.parametrize("show", [side_by_side, contact_sheet])
def test_clips_of_different_sizes_are_refused(clips, show):
    with pytest.raises(ValueError, match=r"\(4, 24, 32, 3\).*one length and size"):
        show(clips | {"second": clips["second"][:4]})


def test_thumbnail_has_a_row_for_each_clip(clips):
    picture = thumbnail(clips, columns=2)
    assert picture.size == (2 * SCALE * 32 + GAP, 3 * SCALE * 24 + 2 * GAP)
    for row, clip in enumerate(clips.values()):
        for column, moment in enumerate((0, 4)):
            at = (column * (SCALE * 32 + GAP) + SCALE * 16, row * (SCALE * 24 + GAP) + SCALE * 12)
            assert picture.getpixel(at) == tuple((clip[moment, 12, 16] * 255).round().int().tolist())


def test_video_gives_the_pictures_back(clips, tmp_path):
    pictures = side_by_side(clips)
    save_video(tmp_path / "clip.mp4", pictures, fps=8)
    with av.open(str(tmp_path / "clip.mp4")) as video:
        assert video.streams.video[0].average_rate == 8
        decoded = [pil_to_tensor(frame.to_image()) for frame in video.decode(video=0)]
    sent = [pil_to_tensor(picture) for picture in pictures]
    sent, decoded = (rearrange(x, "f c y x -> f y x c") / 255 for x in (sent, decoded))
    assert psnr(decoded, sent) > 25


# ------------------------------------------------------------------------------------------ progress, figures


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


STEPS = [
    Progress("1", "VAEEncode", 0, 1),
    Progress("2", "STEMInvertLatents", 0, 1),
    Progress("2", "STEMInvertLatents", 1, 4),
    Progress("2", "STEMInvertLatents", 4, 4),
]


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (io.StringIO(), ["scene: STEMInvertLatents, 4 steps"]),
        (Terminal(), [f"scene [{'#' * BAR}] 4/4 STEMInvertLatents"]),
    ],
    ids=["a line for each slow node", "in place on a terminal"],
)
def test_progress(out, expected):
    show = progress_bar("scene", out)
    for step in STEPS:
        show(step)
    assert [line.rpartition(CLEAR)[2] for line in out.getvalue().rstrip("\n").split("\n")] == expected


def test_edit_is_compared_with_its_truth_and_all_else_with_the_source():
    clips = dict(zip(("source", "reconstruction", "edit"), torch.rand(3, 4, 16, 16, 3), strict=True))
    truth = clips["edit"] + 0.1
    metrics = compare(clips, {"edit": truth}, torch.zeros(3, 16, 16, 2), torch.ones(3, 16, 16))
    assert metrics["edit"]["psnr"] == pytest.approx(20, abs=1e-3)  # -10 log10 0.1^2
    assert metrics["reconstruction"]["psnr"] == psnr(clips["reconstruction"], clips["source"])
    assert metrics["source"].keys() == {"flicker"}


def test_table_has_a_line_for_every_clip():
    metrics = {"source": {"flicker": 0.01234}, "edit": {"psnr": 30.126, "flicker": 0.02, "seconds": 12.4}}
    lines = table({"scene": Result({}, metrics)}).splitlines()
    assert [line.split() for line in lines] == [
        ["PSNR", "SSIM", "flicker", "seconds"],
        ["scene,", "source", "0.0123"],
        ["scene,", "edit", "30.13", "0.0200", "12"],
    ]
    assert lines[1].index("0.0123") == lines[2].index("0.0200") == lines[0].index("flicker") + 1


def test_summary_tells_what_the_edit_shows_and_should_show():
    edit = {
        "psnr_outside_mask": 28.456,
        "shows": {"colour": "purple", "shape": None, "background": "grass"},
        "should_show": {"colour": "blue", "shape": "star", "background": "grass"},
    }
    assert "purple None grass (should show: blue star grass)" in summary(edit)
    assert "28.46" in summary(edit)
