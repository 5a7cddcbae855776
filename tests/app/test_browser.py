"""The page in a headless Chromium: it explains itself, and frames appear as they are generated."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gpdit_lightning.media.video import count_frames
from tests.app.browser import Page, find_chromium, open_page
from tests.app.conftest import Client
from tests.app.test_server import GIVEN, video_bytes

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither Chromium nor Chrome is installed")

GENERATED = "document.querySelectorAll('#strip img:not(.given)').length"
SHOWS_A_BRIGHT_FRAME = (
    "(() => { const c = document.getElementById('canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height)"
    ".data; return d.some((value, i) => i % 4 < 3 && value > 150) })()"
)
DELAYED_MODEL = (
    "const request = fetch; window.fetch = async (path, options) => {"
    "if (path === 'api/model') await new Promise((resolve) => { window.release = resolve; });"
    "return request(path, options); }"
)
OVERFLOWS = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def browse(client: Client, profile: Path, use: Callable[[Page], Awaitable[None]]) -> None:
    """Run a function with the open page, which must work without errors and without requests elsewhere."""

    async def run() -> None:
        assert CHROMIUM is not None
        async with open_page(CHROMIUM, client.url, profile) as page:
            await page.until("document.getElementById('model').textContent.includes('tiny_model')")
            await use(page)
            assert page.problems == []

    asyncio.run(run())


def test_a_video_is_continued_in_the_browser(client: Client, tmp_path: Path) -> None:
    """Choose a file, continue it, stop another continuation, start from noise; also at the width of a phone."""
    (tmp_path / "holiday.mp4").write_bytes(video_bytes(tmp_path))

    async def use(page: Page) -> None:
        text = await page.text()
        for words in ("given", "generated", "Drop a video or an image here", "Choose a file", "Start from noise"):
            assert words in text
        assert await page.js("document.getElementById('generate').disabled")

        await page.choose_file(tmp_path / "holiday.mp4")
        await page.until(f"document.querySelectorAll('#strip img.given').length === {GIVEN}")
        assert f"The last {GIVEN} frames" in await page.text()
        assert await page.js(SHOWS_A_BRIGHT_FRAME)
        assert await page.js("document.getElementById('badge').textContent") == "given"

        chosen = "document.getElementById('start-time').textContent"
        assert await page.js(chosen) == "the last ones"
        last = await page.js("document.querySelector('#strip img.given').src")
        for start, words in ((0.5, "from 0.5 s on"), (99, "the last ones")):  # the slider ends at the last ones
            await page.fill(start=start)
            await page.js("document.querySelector('[name=start]').dispatchEvent(new Event('change'))")
            await page.until(f"{chosen} === '{words}' && !document.querySelector('[name=start]').disabled")
            first = await page.js("document.querySelector('#strip img.given').src")
            assert (first == last) == (start == 99)
            assert await page.js(f"document.querySelectorAll('#strip img.given').length === {GIVEN}")

        await page.fill(seconds=1, label="run")
        await page.click("#generate")
        await page.until(f"{GENERATED} === 12 && !document.getElementById('download').hidden")
        assert "Generated 12 frames" in await page.text()
        await page.until("document.getElementById('badge').textContent === 'generated'")
        address = await page.js("document.getElementById('download').href")
        status, content = client.request("GET", address.removeprefix(client.url))
        assert status == 200
        (tmp_path / "downloaded.mp4").write_bytes(content)
        assert count_frames(tmp_path / "downloaded.mp4") == GIVEN + 12

        await page.resize(390, 844)
        assert not await page.js(OVERFLOWS)
        settings_open = "document.querySelector('#settings details').open"
        await page.fill(steps=0)
        assert not await page.js(settings_open)
        await page.click("#generate")  # shows the invalid value
        await page.until(settings_open)
        await page.fill(seconds=30, steps=100)
        await page.click("#generate")
        await page.until("/^Generated .* left/.test(document.getElementById('message').textContent)")
        assert 0 < await page.js(GENERATED) < 360
        assert await page.js("document.querySelector('[name=seed]').value") == "1"
        await page.fill(seed=5)  # of the next video
        await page.click("#stop")
        await page.until("/^Stopped after .*, with seed 1.$/.test(document.getElementById('message').textContent)")

        await page.click("#other")
        await page.fill(seconds=0.5, steps=2)
        assert await page.js("document.getElementById('start-field').hidden")
        await page.click("#noise")
        await page.until(f"{GENERATED} === 6 && !document.getElementById('download').hidden")
        assert await page.js("document.querySelectorAll('#strip img.given').length") == 0
        assert not await page.js(OVERFLOWS)

    browse(client, tmp_path / "profile", use)


def test_an_unusable_file_is_named_in_the_browser(client: Client, tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("no video")
    (tmp_path / "large.mp4").write_bytes(bytes(1_000_001))

    async def use(page: Page) -> None:
        await page.choose_file(tmp_path / "large.mp4")
        await page.until("document.getElementById('message').textContent.startsWith('large.mp4 is larger than 1 MB')")
        await page.choose_file(tmp_path / "notes.mp4")
        await page.until("document.getElementById('message').textContent.startsWith('notes.mp4 is neither a video')")
        assert await page.js("document.getElementById('message').getAttribute('role')") == "alert"
        page.problems = [problem for problem in page.problems if "400 (Bad Request)" not in problem]

    browse(client, tmp_path / "profile", use)


def test_a_file_that_is_given_before_the_model_is_known_is_used_afterwards(client: Client, tmp_path: Path) -> None:
    (tmp_path / "holiday.mp4").write_bytes(video_bytes(tmp_path))

    async def use(page: Page) -> None:
        await page.call("Page.addScriptToEvaluateOnNewDocument", source=DELAYED_MODEL)
        await page.call("Page.navigate", url=client.url)
        await page.until("typeof release === 'function'")
        assert await page.js("document.getElementById('noise').disabled")
        await page.fill(seconds=1)
        await page.js("document.getElementById('settings').dispatchEvent(new Event('input'))")
        await page.choose_file(tmp_path / "holiday.mp4")
        await page.until("document.getElementById('message').textContent.includes('as soon as the model is ready')")
        await page.js("release()")
        await page.until(f"document.querySelectorAll('#strip img.given').length === {GIVEN}")
        assert not await page.js("document.getElementById('noise').disabled")

    browse(client, tmp_path / "profile", use)
