"""`python -m docs.figures [--run FOLDER] [--only NAME ...]`: figures and screenshots of the documentation.

They are written to docs/images/, and show the present version: the diagram of the architecture, attention of the
recipes, `benchmarks.scaling`, the results of `python -m gpdit_lightning demo` in `--run`, and TensorBoard and the page
of `app` with that run. The last two need Chromium or Chrome. Figures of longer measurements are written by the
benchmarks that docs/experiments.md and docs/performance.md name.
"""

import argparse
import asyncio
import contextlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tests.app.browser import Page, find_chromium, open_page

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
STAGE = "stage3_long_video"
STRIPS = {  # videos that the demo continues, with options of `sample`
    "generation_strip": ("digit_0003", "--context_frames=9", "--frames=12", "--sampler=adams", "--steps=8"),
    "generation_long": ("digit_0004", "--frames=60", "--steps=2"),
}
STARTS_WITHIN = 120.0  # seconds, of TensorBoard and `app`
DRAWN_WITHIN = 60.0  # seconds, of the cards of TensorBoard
COLOURS = 128  # of a screenshot, which has few; it is a third as large

ATTENTION = {
    "attention_gpdit": ["systems/gpdit", "--frames=5"],
    "attention_gpdit_of": ["systems/gpdit", "--frames=5", "--model.init_args.backbone.attention=of"],
    "attention_acdit_video": ["systems/acdit_video"],
    "attention_acdit_image": ["systems/acdit_image"],
    "attention_vidgpt": ["systems/vidgpt"],
    "attention_full_sequence": ["systems/full_sequence"],
}


# Boxes of the diagram of docs/architecture.md: name, package, left, bottom, and the row's colour.
ROWS = {"once": "#dfe7f1", "training": "#fbe3d3", "generation": "#dcefe0", "evaluation": "#ece1f3"}
BOXES = {
    "videos, images": ("", 0, 3, "once"),
    "codec": ("codecs/", 1, 3, "once"),
    "preparation": ("preparation/", 2, 3, "once"),
    "shards, manifest": ("on disk", 3, 3, "once"),
    "batch plan": ("data/", 0, 2, "training"),
    "noise, angles": ("data/, diffusion/", 1, 2, "training"),
    "backbone": ("model/", 2, 2, "training"),
    "loss, optimizer": ("stages/, training/", 3, 2, "training"),
    "checkpoints": ("checkpoints/", 4, 2, "training"),
    "context": ("media/, codecs/", 0, 1, "generation"),
    "KV cache": ("model/", 1, 1, "generation"),
    "sampler": ("diffusion/", 2, 1, "generation"),
    "next block": ("generation/", 3, 1, "generation"),
    "video": ("codecs/, media/", 4, 1, "generation"),
    "held-out videos": ("media/", 0, 0, "evaluation"),
    "features": ("model/, evaluation/", 1, 0, "evaluation"),
    "scores, probes": ("evaluation/, probing/", 2, 0, "evaluation"),
    "report": ("evaluation/, probing/", 3, 0, "evaluation"),
}
LINE = "#5a6572"
WIDE, HIGH = (2.3, 1.7), (1.9, 1.0)  # of the grid and of a box, in both directions


class View(NamedTuple):
    """A view of TensorBoard.

    Attributes:
        dashboard: its name in the address.
        tags: regular expression of the tags that are shown.
        size: width and height of the page.
        stage: the run that is shown; None for all stages.
    """

    dashboard: str
    tags: str
    size: tuple[int, int]
    stage: str | None = None


TENSORBOARD = {
    "monitoring_first": View("timeseries", "", (1300, 1150)),
    "monitoring_custom": View("custom_scalars", "", (1200, 1840)),
    "monitoring_training": View("timeseries", "^loss/|train/(grad_norm|ema_distance|loss_q[14])", (1400, 1130)),
    "monitoring_system": View("timeseries", "system/(clips_per_s|data_wait|hours_left|.*peak)", (1200, 1060)),
    "monitoring_sample": View("timeseries", "^sample/", (1250, 960), STAGE),
    "monitoring_preview": View("images", "sample/strip", (1500, 1000), STAGE),
}
# TensorBoard draws in shadow roots, which querySelector does not enter.
EVERY_ELEMENT = """
    const found = [], search = root => root.querySelectorAll('*').forEach(
        element => { found.push(element); if (element.shadowRoot) search(element.shadowRoot) });
    search(document);
"""


def run_verb(*words: str | Path) -> None:
    """Run a verb of the library, or end with its error."""
    subprocess.run([sys.executable, "-m", "gpdit_lightning", *map(str, words)], cwd=ROOT, check=True)


def draw_architecture() -> None:
    """Draw the data flow from videos to reports, with the packages that compute each part."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    figure = Figure(figsize=(10.5, 6.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    (step_x, step_y), (width, height) = WIDE, HIGH
    for name, (package, column, row, kind) in BOXES.items():
        left, bottom = column * step_x, row * step_y
        style = {"boxstyle": "round,pad=0.02,rounding_size=0.1", "facecolor": ROWS[kind], "edgecolor": LINE}
        axes.add_patch(FancyBboxPatch((left, bottom), width, height, **style))
        middle = left + width / 2
        axes.text(middle, bottom + 0.62, name, ha="center", va="center", fontsize=11)
        axes.text(middle, bottom + 0.27, package, ha="center", va="center", fontsize=8, family="monospace")

    def at(name: str, x: float, y: float) -> tuple[float, float]:
        _, column, row, _ = BOXES[name]
        return column * step_x + x * width, row * step_y + y * height

    def arrow(*points: tuple[float, float]) -> None:
        axes.plot(*zip(*points[:-1], strict=True), color=LINE, linewidth=1)
        axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": LINE, "shrinkA": 0})

    def down(name: str, other: str, x: float, y: float, start: float = 0.5) -> None:
        """Draw an arrow from below a box, along the gap at height y, to the top of another."""
        (left, top), gap = at(name, start, 0), at(other, x, y)
        arrow((left, top), (left, gap[1]), gap, at(other, x, 1.02))

    for name, other in pairwise(BOXES):
        if BOXES[name][2] == BOXES[other][2]:
            arrow(at(name, 1, 0.5), at(other, -0.01, 0.5))
    down("shards, manifest", "batch plan", 0.5, 1.35)
    down("checkpoints", "sampler", 0.5, 1.5)
    down("video", "scores, probes", 0.5, 1.25)
    arrow(at("next block", 0.5, 1), at("next block", 0.5, 1.25), at("KV cache", 0.5, 1.25), at("KV cache", 0.5, 1.02))
    beside = at("checkpoints", 1.08, 0.5)
    arrow(
        at("checkpoints", 1, 0.5),
        beside,
        (beside[0], at("features", 0, 1.5)[1]),
        *(at("features", 0.5, y) for y in (1.5, 1.02)),
    )
    for row, label in zip((3, 2, 1, 0), ROWS, strict=True):
        axes.text(-0.2, row * step_y + height / 2, label, ha="right", va="center", fontsize=11, rotation=90)
    axes.set(xlim=(-0.6, 4 * step_x + width + 0.3), ylim=(-0.2, 3 * step_y + height + 0.2))
    axes.set_axis_off()
    figure.savefig(IMAGES / "architecture.png")


def draw_attention(name: str) -> None:
    """Draw the attention of a recipe's training."""
    recipe, *options = ATTENTION[name]
    run_verb("attention", f"--config=gpdit:{recipe}", *options, "--out", IMAGES / f"{name}.png")


def draw_scaling() -> None:
    """Draw the simulated scaling of GPDiT-H."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--image", str(IMAGES / "scaling.png")]
    subprocess.run(command, cwd=ROOT, check=True)


def copy_demo(run: Path) -> None:
    """Copy the animation of the demo."""
    shutil.copyfile(run / "sample.gif", IMAGES / "demo.gif")


def sample_strip(run: Path, name: str, video: str, *options: str) -> None:
    """Continue a held-out video of the demo, and keep the strip beside the mp4 as a figure."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.mp4")
        context = run / "movies/held_out" / f"{video}.mp4"
        run_verb("sample", "--checkpoint", run / STAGE, "--context", context, "--start=0", *options, "--out", out)
        shutil.copyfile(out.with_suffix(".png"), IMAGES / f"{name}.png")


@contextlib.contextmanager
def served(command: Sequence[str | Path], port: int) -> Iterator[str]:
    """Run a web server for the duration of the block; return its address when it responds."""
    address = f"http://127.0.0.1:{port}/"
    with subprocess.Popen(list(map(str, command)), cwd=ROOT) as process:
        try:
            end = time.monotonic() + STARTS_WITHIN
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(address).close()
                    break
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{' '.join(map(str, command))} does not respond at {address}")
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def free_port() -> int:
    """Return the number of a port that no process uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_few_colours(path: Path) -> None:
    """Make the file of a screenshot smaller."""
    with Image.open(path) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


async def show_tensorboard(chromium: str, address: str, profile: Path, view: View, path: Path) -> None:
    """Open a view in the browser, and write a screenshot of it when all its cards are drawn."""
    stage, tags = view.stage or "", urllib.parse.quote(view.tags)
    settings = f"?darkMode=false&smoothing=0&runFilter={stage}&tagFilter={tags}#{view.dashboard}&regexInput={stage}"
    async with open_page(chromium, address + settings, profile) as page:
        await page.resize(*view.size)
        drawn = "['LINE-CHART', 'VZ-LINE-CHART2', 'CARD-VIEW', 'TF-IMAGE-LOADER'].includes(e.tagName)"
        await page.until(f"(() => {{ {EVERY_ELEMENT} return found.some(e => {drawn}) }})()", DRAWN_WITHIN)
        if view.dashboard == "images":
            await click(page, "e.tagName === 'PAPER-CHECKBOX' && /Show actual image size/.test(e.textContent)")
        if view.dashboard == "timeseries":  # closes the settings
            await click(page, "e.tagName === 'BUTTON' && /Settings/.test(e.textContent)")
        await until_unchanged(page, path)
    with_few_colours(path)


async def click(page: Page, condition: str) -> None:
    """Click the first element e that satisfies a condition, when there is one."""
    await page.until(f"(() => {{ {EVERY_ELEMENT} return found.some(e => {condition}) }})()", DRAWN_WITHIN)
    await page.js(f"(() => {{ {EVERY_ELEMENT} found.find(e => {condition}).click() }})()")


async def until_unchanged(page: Page, path: Path) -> None:
    """Write screenshots until two of them, two seconds apart, are equal."""
    before, end = b"", time.monotonic() + DRAWN_WITHIN
    while time.monotonic() < end:
        await asyncio.sleep(2)
        await page.screenshot(path)
        if path.read_bytes() == before:
            return
        before = path.read_bytes()


def show_training(chromium: str, run: Path, names: Sequence[str]) -> None:
    """Write screenshots of TensorBoard."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", run, "--port", str(port), "--reload_interval=0"]
    with served(command, port) as address, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in names:
            path = IMAGES / f"{name}.png"
            asyncio.run(show_tensorboard(chromium, address, Path(folder, name), TENSORBOARD[name], path))


async def generate_in_page(chromium: str, address: str, profile: Path, video: Path, path: Path) -> None:
    """Continue a video in the page of `app`, and write a screenshot of the whole page."""
    async with open_page(chromium, address, profile) as page:
        await page.resize(1160, 800)
        await page.until("document.getElementById('model').textContent.length > 3")
        await page.choose_file(video)
        await page.until("document.querySelectorAll('#strip img.given').length > 0")
        await page.fill(seconds=1)
        await page.click("#generate")
        await page.until("!document.getElementById('download').hidden", DRAWN_WITHIN)
        await page.screenshot(path, whole=True)
    with_few_colours(path)


def show_app(chromium: str, run: Path) -> None:
    """Write a screenshot of the page of `app`."""
    port, video = free_port(), run / "movies/held_out/digit_0003.mp4"
    command = [sys.executable, "-m", "gpdit_lightning", "app", "--checkpoint", run / STAGE, "--steps=2", "--port"]
    with (
        served([*command, str(port)], port) as address,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    ):
        asyncio.run(generate_in_page(chromium, address, Path(profile), video, IMAGES / "app.png"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the figures."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    parser.add_argument("--only", nargs="+", default=[""], help="regular expressions of the figures' names")
    given = parser.parse_args(arguments)
    run = given.run.resolve()

    def selected(names: Sequence[str]) -> list[str]:
        return [name for name in names if any(re.search(pattern, name) for pattern in given.only)]

    of_demo = selected(["demo", *STRIPS])
    screenshots = selected(list(TENSORBOARD)), selected(["app"])
    if (of_demo or any(screenshots)) and not (run / "sample.gif").is_file():
        sys.exit(f"{run} is no finished demo: run `python -m gpdit_lightning demo`, or give --run.")
    if any(screenshots) and not (chromium := find_chromium()):
        sys.exit("there is no Chromium or Chrome: install one, or leave out the screenshots with --only.")
    for name in selected(list(ATTENTION)):
        draw_attention(name)
    drawn = {"architecture": draw_architecture, "scaling": draw_scaling}
    for name in selected(list(drawn)):
        drawn[name]()
    for name in of_demo:
        if name in STRIPS:
            sample_strip(run, name, *STRIPS[name])
        else:
            copy_demo(run)
    if screenshots[0]:
        show_training(str(chromium), run, screenshots[0])
    if screenshots[1]:
        show_app(str(chromium), run)


if __name__ == "__main__":
    main()
