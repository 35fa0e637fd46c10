import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tools import processes
from tools.server import Server

sys.path.append(str(Path(__file__).parent))  # tests import `front_end`

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),  # the same with and without internet
)
SIZE = {"width": 1920, "height": 1080}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Puts these tests last: from Playwright's first page on an event loop runs in this thread, and there is no second."""
    items.sort(key=lambda item: item.path.is_relative_to(Path(__file__).parent))


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser: $STEM_CHROMIUM, which then must exist, or one that is installed."""
    if asked := os.environ.get("STEM_CHROMIUM"):
        if not (found := shutil.which(asked)):
            pytest.fail(f"STEM_CHROMIUM is {asked}, which is no program. Correct it, or unset it.")
        return found
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed. Install one, or set STEM_CHROMIUM to its path.")


@pytest.fixture(scope="session")
def server(chromium):
    """A running ComfyUI with the pack, and a user's folder that is new."""
    signal.signal(signal.SIGTERM, processes.interrupted)  # so that the server is ended too
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def opened(chromium, server, written):
    from front_end import FrontEnd
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        front_end = FrontEnd(browser.new_page(viewport=SIZE, locale="en-US"), server)
        front_end.open()
        yield front_end
        browser.close()


@pytest.fixture(scope="session")
def written(server):
    """Files in the output folder that tests add here; they are removed when no page shows them any more."""
    files = []
    yield files
    for file in files:
        (server.output_directory / file["subfolder"] / file["filename"]).unlink()


@pytest.fixture
def front_end(opened):
    """The page, with classic rendering and an empty tab of its own; panels that a test left open are closed."""
    opened.ask("() => { app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false); }")
    opened.new_tab()
    opened.render(modern=False)
    opened.forget()
    return opened
