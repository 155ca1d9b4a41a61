"""A real browser: Qt's Chromium in a process of its own, driven by the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

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

    async def screenshot(self, path: Path) -> None:
        done = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(done["data"]))


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """A fresh browser without a screen; needs the extra `browser`."""
    with socket.socket() as free:  # the browser does not pick a port itself
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_REMOTE_DEBUGGING": f"127.0.0.1:{port}",
        # Software alone; and root may not have Chromium's sandbox.
        "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu",
    }
    process = subprocess.Popen(
        [sys.executable, str(WINDOW)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = await asyncio.to_thread(_devtools, process)
        async with aiohttp.ClientSession() as http:
            async with http.get(f"{url}/json") as answer:
                (target,) = await answer.json(content_type=None)
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
