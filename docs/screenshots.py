"""Take the pictures of the playground: a real conversation with an engine, light, dark and on a phone.

python docs/screenshots.py engine.onnx [folder]    # writes docs/images/playground-*.png

It needs playwright, Chromium, and for small files Pillow.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Page, sync_playwright

from runtime import Generator
from runtime.serving import Settings, create_app

IMAGES = Path(__file__).with_name("images")
QUESTION = "Explain in a few sentences why the sky is blue and sunsets are red."
EDIT = (
    "Rewrite this text with a capital letter at the start of each sentence: the ship left at dawn. the sea was calm. "
    "the captain was asleep. nobody woke the captain."
)
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
COLOURS = 160


@contextmanager
def served(engine: Path) -> Iterator[str]:
    """Serve `engine` in the block; yield where."""
    with Generator(engine) as generator:
        app = create_app(generator, Settings(models=("smollm2-135m",)))
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        generator.warm_up()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        server.should_exit = True
        thread.join()


def ask(page: Page, text: str) -> None:
    """Send a message and wait for the whole answer."""
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("body:not(.busy) .stats span")


def branching(page: Page) -> None:
    """Choose the pass whose tree shows most: several tokens, and drafts that were not taken."""
    step = page.evaluate(
        """() => {
          const last = [...document.querySelectorAll('.message.answer')].at(-1).querySelector('.text');
          const sizes = new Map();
          for (const token of last.querySelectorAll('.token.draft')) {
            sizes.set(token.dataset.step, (sizes.get(token.dataset.step) ?? 0) + 1);
          }
          return [...sizes].filter(([, size]) => size <= 3).sort((a, b) => b[1] - a[1])[0][0];
        }"""
    )
    # Not the last token of the pass: where the answer ends there, nothing of it is seen.
    page.locator(f'.message.answer:last-child .column:first-child .token.draft[data-step="{step}"]').first.click()


def shrink(path: Path) -> None:
    """Write a picture with fewer colours, where Pillow is installed."""
    try:
        from PIL import Image
    except ImportError:
        return
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def take(browser: Any, url: str, name: str, folder: Path, viewport: dict[str, int], **context: Any) -> None:
    """Take one picture: a conversation, compared with plain decoding where the name says so."""
    page = browser.new_page(viewport=viewport, reduced_motion="reduce", **context)
    page.goto(url)
    page.wait_for_selector("#model:not(:empty)")
    if name == "dark":
        page.check("#compare")
    ask(page, EDIT if name == "dark" else QUESTION)
    if name == "dark":
        page.wait_for_selector(".verdict")
    branching(page)
    path = folder / f"playground-{name}.png"
    page.screenshot(path=path)
    shrink(path)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    page.close()


def main() -> None:
    """Take all pictures."""
    engine, folder = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else IMAGES
    folder.mkdir(exist_ok=True)
    with served(engine) as url, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        take(browser, url, "light", folder, DESKTOP, color_scheme="light")
        take(browser, url, "dark", folder, DESKTOP, color_scheme="dark")
        take(browser, url, "phone", folder, PHONE, color_scheme="light", has_touch=True)
        browser.close()


if __name__ == "__main__":
    main()
