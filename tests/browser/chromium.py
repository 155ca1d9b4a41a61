"""A real browser in a process of its own, driven by the DevTools protocol.

It is the Chromium of the system where there is one (`CHROMIUM` names another), else Qt's.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WINDOW = Path(__file__).with_name("window.py")
SECONDS = 30
KEYS = {"Enter": 13, "Tab": 9}


class Page:
    """The one page of a browser."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse):
        self._connection = connection
        self._ids = itertools.count(1)
        self.problems: list[str] = []
        """What the console complained of: errors, exceptions, refusals of the policy."""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        await self._connection.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._connection.receive_json()
            self._listen(message)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _listen(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.problems.append(params["entry"]["text"])

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        # Elements hear of the focus in a window that has it alone.
        await self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def evaluate(self, expression: str) -> Any:
        done = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Waits until an expression is true, and gives its value."""
        async with asyncio.timeout(SECONDS):
            while not (value := await self.evaluate(expression)):
                await asyncio.sleep(0.05)
            return value

    async def text(self, selector: str) -> str:
        return await self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    async def type(self, selector: str, text: str) -> None:
        await self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, *, ctrl: bool = False) -> None:
        fields = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        if key == "Enter":
            fields["text"] = "\r"
        modifiers = 2 if ctrl else 0
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, modifiers=modifiers, **fields)

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    async def screenshot(self, name: str, folder: Path) -> None:
        """A picture of the whole page, in the folder that `SCREENSHOTS` names, or in `folder`."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        done = await self.call(
            "Page.captureScreenshot",
            format="png",
            captureBeyondViewport=True,
            clip={"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1},
        )
        picture = base64.b64decode(done["data"])
        assert picture.startswith(b"\x89PNG")
        (Path(os.environ.get("SCREENSHOTS") or folder) / name).write_bytes(picture)


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """A fresh browser without a screen.

    Needs a Chromium of the system, or else the extra `browser`.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command, environment = _command(profile)
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        async with _driven(process) as page:
            yield page


def _command(profile: str) -> tuple[list[str], dict[str, str]]:
    """What starts a browser, and what its environment has. Software draws, and root may not have
    Chromium's sandbox."""
    flags = ["--no-sandbox", "--disable-gpu"]
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is not None:
        window = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        quiet = ["--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars"]
        return [found, *flags, *window, *quiet, "about:blank"], {}
    with socket.socket() as free:  # Qt does not pick a port itself
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [sys.executable, str(WINDOW)], {
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_REMOTE_DEBUGGING": f"127.0.0.1:{port}",
        "QTWEBENGINE_CHROMIUM_FLAGS": " ".join(flags),
    }


@asynccontextmanager
async def _driven(process: subprocess.Popen[str]) -> AsyncIterator[Page]:
    try:
        url = await asyncio.to_thread(_devtools, process)
        async with aiohttp.ClientSession() as http:
            async with http.get(f"{url}/json") as answer:
                targets = await answer.json(content_type=None)
            (target,) = (target for target in targets if target["type"] == "page")
            async with http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as ws:
                yield Page(ws)
    finally:
        process.kill()
        process.communicate()


def _devtools(process: subprocess.Popen[str]) -> str:
    """Where the browser takes orders, which it says at its start."""
    assert process.stderr is not None
    log = []
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    try:
        for line in process.stderr:
            log.append(line)
            _, found, address = line.partition("DevTools listening on ws://")
            if found:
                return f"http://{address.partition('/')[0]}"
    finally:
        watchdog.cancel()
    raise AssertionError("the browser has ended:\n" + "".join(log))
