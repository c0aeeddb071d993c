"""The playground in a real browser: what a person does with it."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx", "playwright"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from playwright.sync_api import expect, sync_playwright

from runtime import Generator, Sampling
from tests.runtime.serving.live import CHAT, Live
from tests.runtime.waiting import until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")

# A status that is an error is told of in the console, by the browser itself.
REFUSED = re.compile(r"Failed to load resource: the server responded with a status of 4\d\d")
# Milliseconds, for machines that do other things as well.
LONGEST = 30_000
WIDE, PHONE = {"width": 1400, "height": 860}, {"width": 360, "height": 740}
TOKENS = "24"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=LONGEST)
    with sync_playwright() as playwright:
        # Chromium's own sandbox needs rights that containers do not give.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """Open the playground in the block. Nothing may be asked of other hosts, and no error be in the console."""
    page = browser.new_page(**{"viewport": WIDE, **options})
    page.set_default_timeout(LONGEST)
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    try:
        yield page
        assert [one for one in asked if not one.startswith(url)] == []
        assert [one for one in errors if not REFUSED.match(one)] == []
    finally:
        page.close()


@pytest.fixture
def page(browser: Browser, live: Live) -> Iterator[Page]:
    with opened(browser, f"{live.url}/") as page:
        expect(page.locator("#model")).to_have_text(live.name)
        page.fill("#max_tokens", TOKENS)
        yield page


def send(page: Page, text: str) -> None:
    """Type a message, send it, and wait for the whole answer."""
    page.locator("#prompt").press_sequentially(text)
    page.keyboard.press("Enter")
    expect(page.locator(".message.answer").last.locator(".stats span").first).to_be_visible()
    expect(page.locator("body")).not_to_have_class(re.compile("busy"))


def answer(page: Page) -> str:
    """Return the last answer's text, as it is shown."""
    return str(page.locator(".text").last.evaluate("node => node.textContent"))


@contextmanager
def slow(generator: Generator) -> Iterator[None]:
    """Make every pass in the block slow, by another request that shares them."""

    def wait(tokens: Any, scores: NDArray[np.floating]) -> NDArray[np.floating]:
        time.sleep(0.05)
        return scores

    request = generator.submit(
        "slow", max_new_tokens=None, ignore_stop_tokens=True, sampling=Sampling(processors=[wait]), speculate=False
    )
    try:
        yield
    finally:
        request.cancel()


def test_what_is_typed_is_answered_with_the_models_text_and_the_conversation_goes_on(
    page: Page, generator: Generator
) -> None:
    first = generator.generate("Hello", max_new_tokens=24)
    send(page, "Hello")
    assert answer(page) == first.text
    told = page.locator(".stats").last.inner_text()
    assert f"{len(first.tokens)} tokens" in told
    assert f"{first.steps} passes" in told
    assert f"{first.tokens_per_step:.2f} tokens per step" in told
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "More"},
    ]
    send(page, "More")
    assert answer(page) == generator.generate(messages, max_new_tokens=24).text
    page.click("#new")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "1")
    page.fill("#seed", "7")
    page.fill("#top_k", "40")
    send(page, "Hello")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    sampling = Sampling(temperature=1.0, seed=7, top_k=40)
    assert answer(page) == generator.generate(messages, max_new_tokens=24, sampling=sampling).text


def test_a_token_shows_the_tree_of_its_pass_as_it_was_verified(page: Page, generator: Generator) -> None:
    passes = generator.generate("Hello", max_new_tokens=24, trace=True).passes
    assert passes is not None
    steps = [one for one in passes if one.tokens]
    send(page, "Hello")
    for step, one in enumerate(steps[1:6], start=1):
        spans = page.locator(f'.text .token[data-step="{step}"]')
        expect(spans).to_have_count(len(one.tokens))
        assert spans.evaluate_all("all => all.filter(one => one.classList.contains('draft')).length") == (
            len(one.accepted) - 1
        )
        spans.first.evaluate("node => node.focus()")
        expect(page.locator("#pass-title")).to_have_text(f"Pass {step + 1} of {len(steps)}")
        drafts = len(one.nodes) - 1
        expect(page.locator("#accepted")).to_have_text(
            f"{len(one.accepted) - 1} of {drafts} draft{'s' * (drafts != 1)} accepted"
        )
        for place, node in enumerate(one.nodes[1:], start=1):
            drawn = page.locator(f'#tree [data-node="{place}"]')
            kind = "accepted" if place in one.accepted else "rejected"
            assert drawn.get_attribute("class") == f"node {kind}"
            shown = drawn.locator(".probability").text_content() or ""
            if node.probability >= 0.001:
                assert float(shown.removesuffix("%")) == pytest.approx(100 * node.probability, abs=0.51)
            else:
                assert shown in ("0%", "<0.1%")
            assert drawn.locator(".source").count() == len(node.sources)
            title = drawn.locator("title").text_content() or ""
            assert " and ".join(node.sources) in title
        expect(page.locator("#tree .node")).to_have_count(len(one.nodes) + 1)
        expect(page.locator("#tree .node.own")).to_have_count(1)
        expect(page.locator("#table tbody tr")).to_have_count(len(one.nodes) + 1)


def test_pointing_at_a_token_shows_its_pass_for_as_long_as_that(page: Page) -> None:
    send(page, "Hello")
    title = page.locator("#pass-title")
    chosen = title.inner_text()
    other = "2" if not chosen.startswith("Pass 3 ") else "4"
    page.locator(f'.token[data-step="{other}"]').last.hover()
    expect(title).to_have_text(re.compile(f"Pass {int(other) + 1} of"))
    page.locator("#prompt").hover()
    expect(title).to_have_text(chosen)


def test_stopping_keeps_what_there_is_and_frees_the_slot(page: Page, generator: Generator) -> None:
    page.fill("#max_tokens", "150")
    before = generator.metrics()
    with slow(generator):
        page.fill("#prompt", "Hello")
        page.keyboard.press("Enter")
        expect(page.locator(".text .token").nth(3)).to_be_attached()
        page.keyboard.press("Escape")
        expect(page.locator(".stats .note")).to_have_text("stopped")
        until(lambda: generator.metrics()["cancelled"] == before["cancelled"] + 1)
        text = answer(page)
        assert text
        # And by its button.
        page.fill("#prompt", "Hello")
        page.click("#send")
        expect(page.locator(".message.answer").last.locator(".text .token").first).to_be_attached()
        page.click("#stop")
        expect(page.locator("#send")).to_be_visible()
        until(lambda: generator.metrics()["cancelled"] == before["cancelled"] + 2)
    whole = generator.generate("Hello", max_new_tokens=150).text
    assert whole.startswith(text)


def test_without_speculation_each_pass_brings_one_token_and_the_text_is_the_same(page: Page) -> None:
    send(page, "Hello")
    text = answer(page)
    page.click("#new")
    page.locator("#speculate").focus()
    page.keyboard.press("Space")
    send(page, "Hello")
    assert answer(page) == text
    assert "1.00 tokens per step" in page.locator(".stats").inner_text()
    expect(page.locator(".token.draft")).to_have_count(0)


def test_speed_is_compared_side_by_side_and_so_are_the_texts(page: Page) -> None:
    page.fill("#temperature", "1")
    page.check("#compare")
    send(page, "Hello")
    verdict = page.locator(".verdict")
    expect(verdict).to_contain_text("Same text")
    texts = page.locator(".text").all_text_contents()
    assert len(texts) == 2
    assert texts[0] == texts[1] != ""
    assert re.match(r"\d+\.\d\d\W$", verdict.locator("strong").inner_text())
    # Or afterwards, of an answer that is there.
    page.uncheck("#compare")
    send(page, "Again")
    page.get_by_role("button", name="Compare with plain decoding").click()
    expect(page.locator(".verdict")).to_have_count(2)


def events(*texts: str) -> str:
    """Return a stream as the server sends it, one token for each text."""
    told = [
        {
            "choices": [
                {
                    "index": 0,
                    "delta": {"content": text},
                    "finish_reason": None,
                    "passes": [
                        {
                            "prompt": not place,
                            "rows": 2,
                            "pseudo_rows": [1],
                            "seconds": 0.01,
                            "nodes": [
                                {"token": 1, "text": text, "parent": -1, "probability": 1.0, "sources": []},
                                {"token": 2, "text": text, "parent": 0, "probability": 0.5, "sources": [text]},
                            ],
                            "accepted": [0],
                            "tokens": [{"token": 3, "text": text, "adds": text}],
                        }
                    ],
                }
            ]
        }
        for place, text in enumerate(texts)
    ]
    return "".join(f"data: {json.dumps(one)}\n\n" for one in told) + "data: [DONE]\n\n"


def test_what_the_model_writes_is_text_whatever_it_looks_like(page: Page) -> None:
    evil = [
        "<script>document.title = 'taken'</script>",
        "<img src=x onerror=\"document.title = 'taken'\">",
        "</div>&amp;",
    ]
    page.route(f"**{CHAT}", lambda route: route.fulfill(content_type="text/event-stream", body=events(*evil)))
    send(page, "<b>Hello</b>")
    assert page.locator(".message.user").inner_text() == "<b>Hello</b>"
    assert answer(page) == "".join(evil)
    for step in (1, 2):
        page.locator(f'.token[data-step="{step}"]').focus()
        assert evil[step] in (page.locator("#tree title").all_text_contents()[1]).replace('\\"', '"')
    expect(page.locator("main img, main script, main b, #inspector img, #inspector script")).to_have_count(0)
    assert page.title() != "taken"


def test_texts_that_differ_are_said_to_differ(page: Page) -> None:
    streams = iter([events("The sea", " is calm"), events("The sea", " was calm")])
    page.route(f"**{CHAT}", lambda route: route.fulfill(content_type="text/event-stream", body=next(streams)))
    page.check("#compare")
    send(page, "Hello")
    expect(page.locator(".verdict .other")).to_have_text("✗ Texts part at character 9")


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    page.reload()
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("One line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user")).to_have_text("One line\nand another")
    expect(page.locator(".after button")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()
    # Back to the answer: its button, then its tokens, one stop for all of them.
    for _ in range(9):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.classList.contains('token')"):
            break
    focused = page.locator(".token:focus")
    expect(focused).to_have_attribute("data-step", re.compile(r"\d+"))
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Home")
    expect(page.locator("#pass-title")).to_have_text(re.compile("^Pass 1 of"))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#pass-title")).to_have_text(re.compile("^Pass 3 of"))
    page.keyboard.press("ArrowLeft")
    expect(focused).to_have_attribute("data-step", "1")
    page.keyboard.press("End")
    last = page.locator(".text .token").last.get_attribute("data-step")
    expect(focused).to_have_attribute("data-step", str(last))


def test_every_control_is_reached_by_tab_and_has_a_name(page: Page) -> None:
    page.locator(".skip").focus()
    names = []
    for _ in range(30):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => {
              const at = document.activeElement;
              const label = at.labels?.[0]?.textContent ?? at.getAttribute("aria-label") ?? at.textContent;
              return at === document.body ? null : (at.id || "") + ":" + label.trim();
            }"""
        )
        if found is None:
            break
        names.append(found)
    assert all(name.split(":", 1)[1] for name in names)
    order = [name.split(":")[0] for name in names]
    wanted = ["new", "theme", "system", "speculate", "temperature", "seed", "top_p", "top_k", "min_p", "max_tokens"]
    assert [name for name in order if name in [*wanted, "prompt", "compare", "send"]] == [
        *wanted,
        "prompt",
        "compare",
        "send",
    ]


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, live: Live) -> None:
    with opened(browser, f"{live.url}/", viewport=PHONE, has_touch=True) as page:

        def fits() -> None:
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            wide = page.evaluate(
                """() => [...document.querySelectorAll("body *")].filter((one) => {
                  const box = one.getBoundingClientRect();
                  return box.width && box.right > 361 && !one.closest(".scroll") && !one.closest("svg")
                    && !one.matches(".unseen, .skip");
                }).map((one) => one.outerHTML.slice(0, 80))"""
            )
            assert wide == []

        fits()
        page.click("#show-options")
        expect(page.locator("#temperature")).to_be_visible()
        fits()
        page.fill("#max_tokens", TOKENS)
        page.click("#show-options")
        page.check("#compare")
        send(page, "A longer message, which does not fit into one line of a phone: " + "x" * 80)
        expect(page.locator(".verdict")).to_be_visible()
        fits()
        expect(page.locator("#inspector")).not_to_be_visible()
        page.locator('.token[data-step="2"]').first.evaluate("node => node.click()")
        expect(page.locator("#inspector")).to_be_visible()
        fits()
        page.click("#close")
        expect(page.locator("#inspector")).not_to_be_visible()


def test_the_theme_is_the_systems_until_another_is_chosen(browser: Browser, live: Live) -> None:
    def lightness(page: Page) -> float:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(float, re.findall(r"\d+", colour)[:3])) / 765

    with opened(browser, f"{live.url}/", color_scheme="dark") as page:
        assert lightness(page) < 0.2
        page.click("#theme")
        assert lightness(page) > 0.8
        page.reload()
        assert lightness(page) > 0.8
        page.click("#theme")
        page.emulate_media(color_scheme="light")
        assert lightness(page) < 0.2
        page.click("#theme")
        assert lightness(page) > 0.8


def test_texts_have_enough_contrast_in_both_themes(page: Page) -> None:
    send(page, "Hello")
    contrast = """() => {
      const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
      const rgb = (colour) => {
        paint.clearRect(0, 0, 1, 1);
        paint.fillStyle = colour;
        paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data];
      };
      const light = (colour) => {
        const linear = (v) => (v <= 10 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = rgb(colour).map(linear);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const behind = (one) => {
        for (let at = one; at; at = at.parentElement) {
          const colour = getComputedStyle(at).backgroundColor;
          if (rgb(colour)[3] === 255) return colour;
        }
        return "white";
      };
      const shown = "p, h1, h2, label, button, .token, .stats span, summary, legend, li";
      const all = [...document.querySelectorAll(shown)].filter((one) => one.getClientRects().length && !one.disabled);
      return all.map((one) => {
        const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((x, y) => y - x);
        return [(a + 0.05) / (b + 0.05), one.outerHTML.slice(0, 90)];
      }).filter(([ratio]) => ratio < 4.5);
    }"""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(200)
        assert page.evaluate(contrast) == []


def test_a_server_with_keys_asks_for_one_and_it_stays_in_this_tab(browser: Browser, serve: Callable[..., Live]) -> None:
    live = serve(api_keys=("sk-right",))
    with opened(browser, f"{live.url}/") as page:
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("sk-wrong")
        page.keyboard.press("Enter")
        expect(page.locator(".problem")).to_have_text("401: the API key is not known here")
        page.fill("#key", "sk-right")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text(live.name)
        expect(page.locator(".problem")).to_have_count(0)
        page.fill("#max_tokens", TOKENS)
        send(page, "Hello")
        assert answer(page)
        assert page.evaluate("JSON.stringify([localStorage, document.cookie])") == '[{},""]'
        assert "sk-right" not in page.content()
        with opened(browser, f"{live.url}/") as other:
            expect(other.locator("#key")).to_be_visible()


def test_what_the_api_refuses_is_said_in_its_own_words(page: Page, live: Live) -> None:
    asked: Any = {"model": live.name, "messages": [{"role": "user", "content": "Hello"}], "temperature": 3}
    message = live.client.post(CHAT, json=asked).json()["error"]["message"]
    page.fill("#temperature", "3")
    page.fill("#prompt", "Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text(f"400: {message}")
    # What was typed is not lost, and what was refused is no part of the conversation.
    expect(page.locator("#prompt")).to_have_value("Hello")
    page.fill("#temperature", "0")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".stats span").first).to_be_visible()


def test_it_works_under_a_prefix(browser: Browser, generator: Generator) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from runtime.serving import Settings, create_app

    inner = create_app(generator, Settings(warm_up=False))
    live = Live(generator, app=Starlette(routes=[Mount("/some/where", inner)]))
    try:
        with opened(browser, f"{live.url}/some/where/") as page:
            page.fill("#max_tokens", TOKENS)
            send(page, "Hello")
            assert answer(page) == generator.generate("Hello", max_new_tokens=24).text
    finally:
        live.close()


def test_the_first_paint_takes_less_than_200_kilobytes_and_a_second_visit_next_to_nothing(
    browser: Browser, live: Live
) -> None:
    context = browser.new_context()
    page = context.new_page()
    session = context.new_cdp_session(page)
    session.send("Network.enable")
    sizes: list[float] = []
    session.on("Network.loadingFinished", lambda told: sizes.append(told["encodedDataLength"]))
    page.goto(f"{live.url}/")
    expect(page.locator("#model")).to_have_text(live.name)
    first = sum(sizes)
    assert 10_000 < first < 200_000
    sizes.clear()
    page.reload()
    expect(page.locator("#model")).to_have_text(live.name)
    assert sum(sizes) < 5_000
    context.close()


def test_motion_is_left_out_where_less_of_it_is_wanted(browser: Browser, live: Live) -> None:
    with opened(browser, f"{live.url}/", reduced_motion="reduce") as page:
        moving = "one => [getComputedStyle(one).animationName, getComputedStyle(one).transitionDuration]"
        assert page.locator("#send").evaluate(moving) == ["none", "0s"]
