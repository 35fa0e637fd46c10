"""ComfyUI's page in a browser, driven as a user drives it: template browser, widgets, Run button, panels, search."""

import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page

from tools import places
from tools.server import Server, refusal

PATIENCE = 60_000  # ms; machines are slow
SCREENSHOTS = places.ROOT / "output" / "browser"
FRAME, TITLE = 16, 30  # pixels of the canvas: around a node where errors are drawn, height of its title
READY = "() => window.app?.graph && window.app.extensionManager?.setting"
LOADED = "names => JSON.stringify(app.graph.nodes.map(node => node.type).sort()) == JSON.stringify(names)"
LOAD = "workflow => app.loadGraphData(workflow, true, true, app.extensionManager.workflow.activeWorkflow)"
SHOW = """([number, scale]) => {  // one node, or all of them at the scale at which they fit
    const nodes = number == null ? app.graph.nodes : [app.graph.getNodeById(number)];
    const areas = nodes.map(node => node.boundingRect), view = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const [left, top] = [0, 1].map(i => Math.min(...areas.map(area => area[i])));
    const [right, bottom] = [0, 1].map(i => Math.max(...areas.map(area => area[i] + area[i + 2])));
    view.scale = scale ?? 0.9 * Math.min(canvas.width / (right - left), canvas.height / (bottom - top), 1);
    view.offset = [canvas.width / view.scale / 2 - (left + right) / 2, canvas.height / view.scale / 2 - (top + bottom) / 2];
    app.canvas.setDirty(true, true);
}"""
WIDGETS = """() => Object.fromEntries(app.graph.nodes.filter(node => node.widgets).map(node =>
    [node.id, node.widgets.filter(widget => widget.serialize !== false).map(widget => [widget.name, widget.value])]))"""
SET_WIDGETS = """values => { for (const node of app.graph.nodes) for (const widget of node.widgets ?? [])
    if (typeof widget.value == typeof values[widget.name]) {
        widget.value = values[widget.name];
        widget.callback?.(widget.value, app.canvas, node);
    } }"""
PICTURE = """number => {  // of a node that shows pictures or a video, in pixels of the page; null before they are there
    const node = app.graph.getNodeById(number), element = document.querySelector(`[data-node-id="${number}"]`);
    const box = area => ({x: area.x, y: area.y, width: area.width, height: area.height});
    const there = media => media.complete ? media.naturalWidth > 0 : media.readyState >= 2;
    const media = [...(element ?? node.videoContainer)?.querySelectorAll('.image-preview img, video') ?? []];
    if (media.length) return media.every(there) ? box(media[0].getBoundingClientRect()) : null;
    const preview = node.widgets?.find(widget => widget.name == '$$canvas-image-preview');
    if (element || !preview || !node.imgs?.length || !node.imgs.every(there)) return null;
    const view = app.canvas.ds, canvas = app.canvas.canvas.getBoundingClientRect();
    const [x, y] = [node.pos[0] + view.offset[0], node.pos[1] + preview.y + view.offset[1]];
    return {x: canvas.x + x * view.scale, y: canvas.y + y * view.scale,
            width: node.size[0] * view.scale, height: (node.size[1] - preview.y) * view.scale};
}"""
BOXES = """() => app.graph.nodes.map(node => {  // as they are drawn, in pixels of the canvas
    const element = document.querySelector(`[data-node-id="${node.id}"]`), scale = app.canvas.ds.scale;
    const drawn = element?.getBoundingClientRect();
    const area = drawn ? [drawn.x / scale, drawn.y / scale, drawn.width / scale, drawn.height / scale] : node.boundingRect;
    return [node.title, ...area];
})"""

AROUND = """number => {  // a node and its frame, in pixels of the page
    const [x, y, width, height] = app.graph.getNodeById(number).boundingRect, view = app.canvas.ds, frame = FRAME;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    return [canvas.x + (x + view.offset[0] - frame) * view.scale, canvas.y + (y + view.offset[1] - frame) * view.scale,
            (width + 2 * frame) * view.scale, (height + 2 * frame) * view.scale];
}""".replace("FRAME", str(FRAME))


class Message(NamedTuple):
    """What the page's console told as an error."""

    text: str
    url: str  # of the file that could not be loaded, or of the script that told


class FrontEnd:
    """The page of a server; `errors` holds what its console has told since it was opened, or since `forget`."""

    def __init__(self, page: Page, server: Server):
        self.page, self.server, self.address = page, server, server.address
        self.errors: list[Message] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda told: told.type == "error" and self._note(told.text, told.location.get("url", "")))
        page.on("pageerror", lambda error: self._note(f"{error.message}\n{error.stack}", page.url))

    def _note(self, text: str, url: str) -> None:
        self.errors.append(Message(text, url))

    def forget(self) -> None:
        self.errors.clear()

    def open(self) -> None:
        """Open the page; a new user's template browser, which opens by itself, is closed."""
        self.page.goto(self.address)
        self.page.wait_for_function(READY)
        self.templates.wait_for()
        self.page.get_by_role("button", name="Close dialog").click()
        self.templates.wait_for(state="hidden")

    def set(self, setting: str, value: Any) -> None:
        self.ask("([name, value]) => app.extensionManager.setting.set(name, value)", [setting, value])

    def render(self, modern: bool) -> None:
        """Nodes as elements of the page (modern), or drawn on the canvas (classic)."""
        self.set("Comfy.VueNodes.Enabled", modern)
        self.wait(
            "modern => document.querySelectorAll('[data-node-id]').length == (modern ? app.graph.nodes.length : 0)", modern
        )

    def ask(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def wait(self, script: str, argument: Any = None) -> Any:
        """Wait until a condition holds; returns its value."""
        return self.page.wait_for_function(script, arg=argument).json_value()

    def find(self, test_id: str) -> Locator:
        return self.page.get_by_test_id(test_id)

    @property
    def templates(self) -> Locator:
        return self.find("template-workflows-content")

    def browse_templates(self) -> None:
        """Open the template browser at the pack's own category."""
        self.page.locator(".templates-tab-button").click()
        self.templates.wait_for()
        self.page.get_by_role("button", name=places.PACK, exact=True).click()

    def card(self, template: str) -> Locator:
        return self.find(f"template-workflow-{template}")

    def open_template(self, template: str, types: list[str]) -> None:
        """Click a card of the template browser; done when nodes of these types are on the canvas, and no other."""
        self.card(template).click()
        self.templates.wait_for(state="hidden")
        self.wait(LOADED, sorted(types))

    def new_tab(self) -> None:
        """An empty workflow, where no node has shown anything yet."""
        before = self.ask("() => app.extensionManager.workflow.activeWorkflow.path")
        self.ask("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        self.wait("path => app.extensionManager.workflow.activeWorkflow.path != path && app.graph.nodes.length == 0", before)

    def load(self, workflow: dict) -> None:
        """Put a workflow on the canvas, in the tab that is open."""
        self.ask(LOAD, workflow)

    def save(self) -> dict:
        return self.ask("() => app.graph.serialize()")

    def prompt(self) -> dict:
        """What the Run button would send."""
        return self.ask("async () => (await app.graphToPrompt()).output")

    def widgets(self) -> dict[str, list]:
        """Node id -> name and value of its widgets, in their order."""
        return self.ask(WIDGETS)

    def set_widgets(self, values: dict[str, Any]) -> None:
        """Set all widgets of these names and kinds of value, as an entry by hand does."""
        self.ask(SET_WIDGETS, values)

    def run(self) -> str:
        """Press Run; returns the prompt id.

        Raises:
            GraphError: ComfyUI refuses the graph, in whole or in part.
        """
        with self.page.expect_response(lambda r: r.request.method == "POST" and r.url.endswith("/prompt")) as answer:
            self.find("queue-button").click()
        told = answer.value.json()
        if told.get("error") or told["node_errors"]:
            raise refusal(told)
        return told["prompt_id"]

    def show(self, node: int, scale: float = 1.0) -> None:
        """Bring a node to the middle of the canvas."""
        self.ask(SHOW, [node, scale])

    def select(self, node: int) -> None:
        """Bring a node to the middle of the canvas and click its title."""
        self.show(node)
        self.drawn()
        x, y, width, _ = self.ask(AROUND, node)
        self.page.mouse.click(x + width / 2, y + FRAME + TITLE / 2)

    def show_all(self) -> None:
        self.ask(SHOW, [None, None])

    def drawn(self) -> None:
        """Wait until the canvas has been drawn anew."""
        self.ask("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def picture(self, node: int) -> np.ndarray:
        """The area in which a node shows its pictures or video, as it is on the page: rows, columns, RGB from 0 to 255."""
        self.show(node)
        area, before = self.wait(PICTURE, node), None
        while area != before:  # nodes move with the next drawing, and grow when a video's size is known
            self.drawn()
            area, before = self.wait(PICTURE, node), area
        return self._seen(area)

    def body(self, node: int) -> np.ndarray:
        """The lower half of a node, where it has pictures when there are any."""
        x, y, width, height = self.ask(AROUND, node)
        return self._seen({"x": x, "y": y + height / 2, "width": width, "height": height / 2})

    def red(self, node: int) -> int:
        """How many pixels at and around a node are of a clear red, the colour of errors."""
        x, y, width, height = self.ask(AROUND, node)
        r, g, b = np.moveaxis(self._seen({"x": x, "y": y, "width": width, "height": height}), -1, 0)
        return int(((r > 120) & (r > 2 * g) & (r > 2 * b)).sum())

    def _seen(self, area: dict[str, float]) -> np.ndarray:
        self.drawn()
        with Image.open(io.BytesIO(self.page.screenshot(clip=area))) as picture:
            return np.asarray(picture.convert("RGB"), np.float32)

    def boxes(self) -> list[tuple[str, float, float, float, float]]:
        """Title, left, top, width and height of every node as it is drawn."""
        return [tuple(box) for box in self.ask(BOXES)]

    def screenshot(self, name: str) -> None:
        """Keep the page as output/browser/`name`.png, for people."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.drawn()
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")
