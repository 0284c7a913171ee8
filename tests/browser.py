"""Fixtures of all tests: draw.html in Debian's Chromium, moved by real mouse, keyboard and touch events."""

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-quic"]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """One for all tests of a file. Without it they are skipped; .ci/run installs Chromium, or fails."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt install chromium")
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as chromium:
        yield chromium


@pytest.fixture
def hands(browser) -> Iterator:
    """A window in which nothing has ever been drawn."""
    found = Hands(browser)
    yield found
    found.close()


@pytest.fixture
def photo(tmp_path) -> Path:
    return picture(tmp_path / "my photo.png", 96, 64)


@pytest.fixture
def one_box(hands, photo) -> None:
    """The photo is open, with one object in it."""
    hands.open(photo)
    hands.drag((10, 10), (30, 30))


class Hands:
    """A person before the page: what they do are input events, what they see is read from the page."""

    def __init__(self, browser, address: str = "", size: tuple[int, int] = (1200, 800), **options):
        self.context = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True)), **options)
        self.address, self.errors, self.asked = address or (ROOT / "tools/draw.html").as_uri(), [], []
        self.new_page()

    def new_page(self):
        page = self.context.new_page()
        page.set_default_timeout(20000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("filechooser", lambda _: None)  # from now on no dialog of the system's opens
        page.goto(self.address)
        page.evaluate("ready")
        self.page, self.cdp = page, self.context.new_cdp_session(page)
        return page

    def close(self) -> None:
        self.context.close()
        assert not self.errors, self.errors

    def see(self, expression: str):
        """Its value. As one text, much comes faster."""
        return json.loads(self.page.evaluate(f"(async () => JSON.stringify(await ({expression}) ?? null))()"))

    def look(self, layer: str, x: float, y: float) -> list[int]:
        """The colour that a canvas has at a point of the picture, [red, green, blue, alpha]."""
        at = f"...middle([{x}, {y}, {x} + 1, {y} + 1]).map(v => v * view.ratio), 1, 1"
        return self.see(f"[...$('{layer}').getContext('2d').getImageData({at}).data]")

    def mask(self, k: int) -> np.ndarray:
        """An object's mask as it would be saved."""
        text = self.see(f"maskPixels(page.drawing.objects[{k}]).lit.join('')")
        size = self.see("[page.drawing.height, page.drawing.width]")
        return np.frombuffer(text.encode(), np.uint8).reshape(size) == ord("1")

    def wait(self, expression: str, seconds: float = 20) -> None:
        """Until it holds. Playwright's own way needs eval, which the page forbids."""
        for _ in range(int(seconds / 0.02)):
            if self.see(expression):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"never so: {expression}; the page says {self.note!r}")

    @property
    def note(self) -> str:
        return self.see("[...document.querySelectorAll('.says')].map(place => place.textContent).join('')")

    @property
    def state(self) -> str:
        return self.see("JSON.stringify([page.drawing, page.past, page.future])")

    def boxes(self, k: int = 0) -> dict[str, list]:
        return self.objects[k]["boxes"]

    @property
    def objects(self) -> list[dict]:
        return self.see("page.drawing.objects")

    def open(self, *files: Path, button: str = "#open") -> None:
        """Open files by the button, and wait until they are taken or refused."""
        with self.page.expect_file_chooser() as chooser:
            self.page.click(button)
        chooser.value.set_files(files)
        self.wait("!$('pane').ariaBusy")

    def save(self, folder: Path, by: str = "#save") -> Path:
        """Save a zip by a #button or a key, unpack it in the folder, and return where it lies."""
        with zipfile.ZipFile(self.download(by)) as file:
            assert file.testzip() is None
            file.extractall(folder)
            return folder / Path(file.namelist()[0]).parent

    def download(self, by: str) -> Path:
        """What a #button or a key saves."""
        with self.page.expect_download() as found:
            self.page.click(by) if by.startswith("#") else self.press(by)
        return found.value.path()

    def example(self) -> None:
        self.page.click("#exampleFirst")
        self.wait("page.drawing.objects.length === 2")

    def make(self, number: int = 1) -> None:
        """Generate, until so many videos are there."""
        self.page.click("#generate")
        self.wait(f"!page.job && page.videos.length === {number}", 120)

    def fill(self, name: str, text: str) -> None:
        """Type into a field and leave it."""
        self.page.fill(name, text)
        self.press("Tab")

    def spot(self, x: float, y: float) -> tuple[float, float]:
        """Where on the screen a point of the picture is."""
        area = self.see("(({left, top}) => [left + view.x, top + view.y, view.scale])(stage.getBoundingClientRect())")
        return area[0] + x * area[2], area[1] + y * area[2]

    def drag(self, start, end, steps: int = 4, frame: int | None = None) -> None:
        """With the mouse, between two points of the picture; in a frame, if one is named, to which the page goes."""
        if frame is not None:
            self.go(frame)
        self.drag_on_screen(self.spot(*start), self.spot(*end), steps)

    def paint(self, start, end, width: int = 20, key: str = "b") -> None:
        """Paint in the chosen object's mask with a brush of this width; or erase, with the key e."""
        self.page.locator("#brush").fill(str(width))
        self.press(key)
        self.drag(start, end, steps=1)
        self.press(key)

    def drag_on_screen(self, start, end, steps: int = 4) -> None:
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move(*end, steps=steps)
        self.page.mouse.up()

    def touch(self, points: list[tuple[float, float]], pause: int = 40) -> None:
        """A finger on the screen, through these points. In no time it would be a fling, which swallows the next tap."""
        for number, point in enumerate(points):
            self.finger("touchMove" if number else "touchStart", point)
            self.page.wait_for_timeout(pause)
        self.finger("touchEnd")

    def finger(self, kind: str, *points: tuple[float, float]) -> None:
        named = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        self.cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": named})

    def go(self, frame: int) -> None:
        """To a frame, by a click on the ruler."""
        area = self.page.locator("#ruler").bounding_box()
        self.page.mouse.click(area["x"] + self.see(f"xOf({frame})"), area["y"] + 10)
        assert self.see("page.now") == frame

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def settle(self) -> None:
        """Until the drawing is kept."""
        self.wait("!page.due")
        self.see("(async () => { let last; do { last = page.saving; await last; } while (last !== page.saving); })()")

    def reload(self) -> None:
        self.settle()
        self.page.reload()
        self.page.evaluate("ready")


def picture(path: Path, width: int, height: int, noise: bool = False) -> Path:
    """A photograph of sorts: a gradient, or noise that no file makes small."""
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    else:
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([60 + 150 * x / width, 60 + 150 * y / height, np.full_like(x, 120)], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path
