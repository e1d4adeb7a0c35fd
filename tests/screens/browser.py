"""A headless Chromium, driven over its DevTools protocol: open a page, click, look at it."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

PATIENCE_S = 120.0


class Browser:
    """One page; its address is that of its DevTools socket."""

    def __init__(self, address: str, loop: asyncio.Runner) -> None:
        self._loop, self._calls = loop, 0
        self._session = loop.run(_session())
        self._socket = loop.run(_connected(self._session, address))

    def close(self) -> None:
        self._loop.run(self._session.close())

    def call(self, method: str, **params: Any) -> Any:
        """The result of a DevTools command."""
        self._calls += 1
        self._loop.run(self._socket.send_json({"id": self._calls, "method": method, "params": params}))
        while True:
            answer = self._loop.run(self._socket.receive_json(timeout=PATIENCE_S))
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def shows(self, text: str) -> None:
        """Wait until the page says `text`."""
        end = time.monotonic() + PATIENCE_S
        while text not in (said := self.run("document.body?.innerText ?? ''")):
            assert time.monotonic() < end, f"waited in vain for {text}; the page says\n{said}"
            time.sleep(0.3)

    def click(self, element: str) -> None:
        """Click in the middle of the `element` that a JavaScript expression finds."""
        middle = f"(r => ({{x: r.x + r.width / 2, y: r.y + r.height / 2}}))({element}.getBoundingClientRect())"
        where = self.run(middle)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def settle(self) -> None:
        """Let what moves come to rest."""
        time.sleep(1.5)

    def shot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(folder: Path, width: int, height: int) -> Iterator[Browser]:
    """A browser with a profile in `folder`."""
    program = shutil.which("chromium")
    assert program, "no chromium here"
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
    arguments += [f"--window-size={width},{height}", f"--user-data-dir={folder}", "about:blank"]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen([program, *arguments], stdout=log, stderr=log)
    try:
        port_file, end = folder / "DevToolsActivePort", time.monotonic() + PATIENCE_S
        while not port_file.exists() or not port_file.read_text():
            assert process.poll() is None and time.monotonic() < end, (folder / "chromium.log").read_text()
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        pages = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list").read())
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        with asyncio.Runner() as loop, closing(Browser(address, loop)) as page:
            yield page
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()  # which wants a running loop


async def _connected(session: aiohttp.ClientSession, address: str) -> aiohttp.ClientWebSocketResponse:
    return await session.ws_connect(address, max_msg_size=0)
