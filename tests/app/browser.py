"""A headless Chromium, driven through its DevTools protocol with aiohttp, which the package needs anyway."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
STARTS_WITHIN = 30.0  # seconds


def find_chromium() -> str | None:
    """Return the path of Chromium or Chrome, if one is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A page of the browser.

    Args:
        socket: connection to the page.

    Attributes:
        problems: messages of the console at level error, exceptions of scripts, and addresses elsewhere that were
            requested.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, url: str) -> None:
        self.problems: list[str] = []
        self._socket, self._url, self._number = socket, url, 0
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            content = json.loads(message.data)
            if "id" in content:
                self._answers.pop(content["id"]).set_result(content)
            elif content["method"] == "Runtime.exceptionThrown":
                self.problems.append(content["params"]["exceptionDetails"]["exception"].get("description", "exception"))
            elif content["method"] == "Log.entryAdded" and content["params"]["entry"]["level"] == "error":
                self.problems.append(content["params"]["entry"]["text"])
            elif content["method"] == "Network.requestWillBeSent":
                address = content["params"]["request"]["url"]
                if not address.startswith((self._url, "data:", "blob:")):
                    self.problems.append(f"request of {address}")

    async def call(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        content = await answer
        assert "error" not in content, content
        return content["result"]

    async def js(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, after a promise was fulfilled."""
        result = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not await self.js(expression):
            assert time.monotonic() < end, f"{expression} was not true; the page shows {await self.text()}"
            await asyncio.sleep(0.05)

    async def text(self) -> str:
        """Return the visible text of the page."""
        return str(await self.js("document.body.innerText"))

    async def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        box = await self.js(
            f"(() => {{ const e = document.querySelector('{selector}'); e.scrollIntoView({{block: 'center'}});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    async def fill(self, **values: str | float) -> None:
        """Set fields of the form, by their names."""
        for name, value in values.items():
            await self.js(f"document.querySelector('[name={name}]').value = {json.dumps(value)}")

    async def choose_file(self, path: Path) -> None:
        """Choose a file for the page's file input."""
        document = await self.call("DOM.getDocument")
        node = await self.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector="input[type=file]")
        await self.call("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(path)])

    async def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Show the page as on a screen of this size; one of less than 700 pixels is that of a phone."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if width < 700 else 1,
            mobile=width < 700,
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a PNG of the visible part of the page, or of the whole page."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def open_page(executable: str, url: str, profile: Path) -> AsyncIterator[Page]:
    """Start the browser, open a page at 1280x800, and end the browser at the end of the block.

    Args:
        executable: path of the browser.
        url: address of the page.
        profile: a new folder for files of the browser, whose processes may write there until shortly after the block.
    """
    command = [executable, *SWITCHES, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            async with aiohttp.ClientSession() as session:
                address = await _page_address(session, profile / "DevToolsActivePort")
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    page = Page(socket, url)
                    for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
                        await page.call(f"{domain}.enable")
                    await page.resize(1280, 800)
                    await page.call("Page.navigate", url=url)
                    await page.until("document.readyState === 'complete'")
                    yield page
        finally:
            process.kill()


async def _page_address(session: aiohttp.ClientSession, port_file: Path) -> str:
    """Return the address of the page's socket, from the file in which the browser writes its port."""
    end = time.monotonic() + STARTS_WITHIN
    while not (port_file.is_file() and port_file.read_text().count("\n") == 1):
        assert time.monotonic() < end, "the browser did not start"
        await asyncio.sleep(0.05)
    port = port_file.read_text().splitlines()[0]
    async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
        targets = await response.json()
    return str(next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"))
