"""A real ComfyUI as a server, for tests, the demo and the templates.

`python -m tools.server` runs one in the foreground; what follows goes to ComfyUI (default: --port 8188).
"""

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools import places, processes
from tools.comfy import installed

Graph = dict[str, dict[str, Any]]  # API format: node id -> {"class_type": .., "inputs": ..}


class GraphError(Exception):
    """A graph was refused, or failed while it ran."""

    def __init__(self, message: str, node_id: str | None = None, class_type: str | None = None):
        super().__init__(f"{class_type} (node {node_id}): {message}" if node_id else message)
        self.message, self.node_id, self.class_type = message, node_id, class_type


class GraphInterrupted(GraphError):
    """A graph was cancelled while it ran."""


class ServerError(Exception):
    """The server did not start, died, or did not understand a request."""


class Progress(NamedTuple):
    node_id: str
    class_type: str
    value: float
    maximum: float


class StatusLine(NamedTuple):
    """Text that is shown at a node."""

    node_id: str
    text: str


class Preview(NamedTuple):
    """A picture that is shown at a node while it runs."""

    node_id: str
    kind: str  # MIME type
    data: bytes


Shown = StatusLine | Preview


def command_line(where: places.Locations, extra_packs: Sequence[Path] = ()) -> list[str]:
    """ComfyUI's main.py with this pack and no other but those named."""
    return [
        str(where.python),
        str(where.comfyui / "main.py"),
        *("--base-directory", str(where.base_directory)),
        *("--disable-all-custom-nodes", "--whitelist-custom-nodes", places.PACK),
        *(pack.name for pack in extra_packs),
        "--disable-auto-launch",
        "--disable-api-nodes",
    ]


class Server:
    """A ComfyUI server with this pack, for the time of a `with` block.

    User data and temporary files are its own, so several servers of one checkout can run at a time; input and
    output folders are those of the base directory.

    Args:
        argv: further options of ComfyUI.
        port: None for a free one.
        patience: seconds until it must be up.
        extra_packs: folders of further node packs, loaded from where they are.
    Raises:
        ServerError: it does not come up; with the end of its log.
    """

    def __init__(
        self,
        argv: Sequence[str] = ("--cpu",),
        port: int | None = None,
        patience: float = 300,
        extra_packs: Sequence[Path] = (),
    ):
        self.where = installed()
        self.argv, self.port, self.patience = argv, free_port(port or 0), patience
        self.extra_packs = extra_packs
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = self.where.base_directory / "logs" / f"server-{self.port}.log"
        self.input_directory = self.where.base_directory / "input"
        self.output_directory = self.where.base_directory / "output"

    def __enter__(self) -> "Server":
        self._own = tempfile.TemporaryDirectory(prefix="stem-server-", ignore_cleanup_errors=True)
        own_options = ["--temp-directory", self._own.name, "--user-directory", self._own.name]
        own_options += ["--database-url", "sqlite:///:memory:", "--port", str(self.port)]
        if self.extra_packs:
            search_paths = Path(self._own.name) / "extra_packs.yaml"
            folders = "\n".join(str(pack.parent) for pack in self.extra_packs)
            search_paths.write_text(json.dumps({"extra": {"custom_nodes": folders}}), encoding="utf-8")
            own_options += ["--extra-model-paths-config", str(search_paths)]
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command_line(self.where, self.extra_packs), *own_options, *self.argv],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self._process.pid

    def close(self) -> None:
        """End the server and all that it started."""
        processes.end_process(self._process)
        self._own.cleanup()

    def get(self, path: str) -> Any:
        """GET a path; returns the parsed JSON, or the body as bytes when it is none."""
        return self._request(path)

    def post(self, path: str, body: Any) -> Any:
        """POST a body as JSON; returns as `get` does."""
        return self._request(path, json.dumps(body).encode())

    def object_info(self) -> dict[str, dict]:
        return self.get("/object_info")

    def queue(self, graph: Graph, client_id: str | None = None, preview_method: str = "default") -> str:
        """Queue a graph; returns its prompt id.

        Args:
            client_id: whom to tell of its progress.
            preview_method: of samplers; "default" is what the server was started with.
        Raises:
            GraphError: ComfyUI refuses it, in whole or in part.
        """
        request = {"prompt": graph, "extra_data": {"preview_method": preview_method}}
        answer = self.post("/prompt", request | ({"client_id": client_id} if client_id else {}))
        if answer["node_errors"]:  # some outputs are valid and were queued all the same
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt(answer["prompt_id"])
            raise refusal(answer)
        return answer["prompt_id"]

    def run(
        self,
        graph: Graph,
        on_progress: Callable[[Progress], None] | None = None,
        timeout: float = 600,
        on_shown: Callable[[Shown], None] | None = None,
        preview_method: str = "default",
    ) -> dict:
        """Queue a graph and wait for its end; returns its entry in the history, "outputs" naming the files.

        Args:
            on_progress: called when a node begins (value 0 of 1) and at each of its steps.
            on_shown: called with what is shown at a node while it runs.
            preview_method: as for `queue`.
        Raises:
            GraphError: it was refused, failed, or a node was blocked. GraphInterrupted: it was cancelled.
            TimeoutError: it took longer than `timeout` seconds; it is cancelled.
        """
        nothing = lambda _: None  # noqa: E731
        return asyncio.run(self._run(graph, on_progress or nothing, timeout, on_shown or nothing, preview_method))

    def wait(self, prompt_id: str, timeout: float = 600) -> dict:
        """Wait for a queued graph; returns and raises as `run`, but that the history omits blocked nodes."""
        end = time.monotonic() + timeout
        while not (entry := self.get(f"/history/{prompt_id}").get(prompt_id)):
            if time.monotonic() > end:
                raise self._late(prompt_id, timeout)
            time.sleep(0.1)
        for kind, event in entry["status"]["messages"]:
            if kind == "execution_interrupted":
                raise GraphInterrupted("interrupted", event["node_id"], event["node_type"])
            if kind == "execution_error":
                raise GraphError(event["exception_message"].strip(), event["node_id"], event["node_type"])
        return entry

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Cancel the graph that runs, or this one if it runs."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    async def _run(
        self,
        graph: Graph,
        on_progress: Callable[[Progress], None],
        timeout: float,
        on_shown: Callable[[Shown], None],
        preview_method: str,
    ) -> dict:
        import aiohttp  # ComfyUI brings it

        client_id = uuid.uuid4().hex
        end = time.monotonic() + timeout
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{self.address}/ws?clientId={client_id}", max_msg_size=0) as events:
                await events.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
                prompt_id, blocked = self.queue(graph, client_id, preview_method), None
                while True:
                    try:
                        message = await asyncio.wait_for(events.receive(), max(end - time.monotonic(), 0))
                    except asyncio.TimeoutError:  # not the builtin before Python 3.11
                        raise self._late(prompt_id, timeout) from None
                    if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                        raise ServerError(f"The server broke off. The end of {self.log}:\n{self.log_tail()}")
                    if message.type == aiohttp.WSMsgType.BINARY:
                        on_shown(read_shown(message.data))
                    if message.type != aiohttp.WSMsgType.TEXT:
                        continue
                    event = json.loads(message.data)
                    kind, data = event["type"], event["data"]
                    if data.get("prompt_id") != prompt_id:
                        continue
                    if kind == "execution_error" and data["exception_type"] == "ExecutionBlocked":
                        blocked = GraphError(data["exception_message"], data["node_id"], data["node_type"])
                    if kind not in ("executing", "progress"):
                        continue
                    if (node_id := data["node"]) is None:
                        entry = self.wait(prompt_id, max(end - time.monotonic(), 1))
                        if blocked:
                            raise blocked
                        return entry
                    class_type = graph.get(node_id, {}).get("class_type", "")
                    on_progress(Progress(node_id, class_type, data.get("value", 0), data.get("max", 1)))

    def _late(self, prompt_id: str, timeout: float) -> TimeoutError:
        self.interrupt(prompt_id)
        return TimeoutError(f"The graph was not done after {timeout:.0f} s and was cancelled. See {self.log}.")

    def _wait_until_up(self) -> None:
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServerError(
                    f"ComfyUI ended with code {self._process.returncode} while it started. "
                    f"The end of {self.log}:\n{self.log_tail()}"
                )
            try:
                self.get("/system_stats")
                return
            except urllib.error.URLError:
                time.sleep(0.25)
        raise ServerError(f"No answer in {self.patience:.0f} s. The end of {self.log}:\n{self.log_tail()}")

    def _request(self, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=60) as response:
                kind, content = response.headers.get_content_type(), response.read()
        except urllib.error.HTTPError as error:
            content = error.read()
            if path == "/prompt" and error.code == 400:
                raise refusal(json.loads(content)) from None
            raise ServerError(f"{path}: HTTP {error.code}: {content[:500].decode(errors='replace')}") from None
        return json.loads(content) if kind == "application/json" else content


def read_shown(message: bytes) -> Shown:
    """A binary message: its kind, the length of what tells the node, that, and what is shown."""
    kind, length = struct.unpack(">II", message[:8])
    told, shown = message[8 : 8 + length].decode(), message[8 + length :]
    if kind == 3:
        return StatusLine(told, shown.decode())
    if kind == 4:
        told = json.loads(told)
        return Preview(told["node_id"], told["image_type"], shown)
    raise ServerError(f"The server sent a binary message of kind {kind}; 3 (text) and 4 (a preview with metadata) are known.")


def refusal(answer: dict) -> GraphError:
    """The error of a graph that did not pass validation: the first node at fault, what is wrong with all."""
    faults = [
        (node_id, node["class_type"], f"{error['message']}: {error['details']}")
        for node_id, node in answer["node_errors"].items()
        for error in node["errors"]
    ]
    if not faults:
        return GraphError(f"{answer['error']['message']}: {answer['error']['details']}")
    (node_id, class_type, first), *others = faults
    rest = [f"{other_type} (node {other_id}): {message}" for other_id, other_type, message in others]
    return GraphError("\n".join([first, *rest]), node_id, class_type)


def free_port(port: int) -> int:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerError(f"Port {port} cannot be used ({error}). End what uses it, or choose another.") from error
        return probe.getsockname()[1]


def serve(argv: Sequence[str]) -> None:
    """Become a ComfyUI server with this pack, on the GPU if there is one."""
    import torch

    where = installed()
    database = f"sqlite:///{where.base_directory / 'user' / 'comfyui.db'}"
    device = () if torch.accelerator.is_available() else ("--cpu",)
    os.execv(
        where.python,
        [*command_line(where), "--database-url", database, *device, *(argv or ("--port", "8188"))],
    )


if __name__ == "__main__":
    serve(sys.argv[1:])
