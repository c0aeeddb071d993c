"""The playground as it is served: one page and its own files, under a strict policy, wherever the server is mounted."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount

from runtime import Generator
from runtime.serving import Settings, create_app
from runtime.serving.cli import build_parser, settings_of
from runtime.serving.playground import STATIC
from tests.runtime.serving.live import Live

ROOT = Path(__file__).parents[3]


def files_of(page: httpx.Response) -> list[str]:
    """Return what a page names of its own, as it stands there."""
    return re.findall(r'(?:src|href)="([^"#]+)"', page.text)


def test_the_page_may_load_its_own_files_and_run_its_own_scripts_and_nothing_else(live: Live) -> None:
    page = live.client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(one.split(" ", 1) for one in page.headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert {policy.pop(name) for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert set(policy.values()) == {"'none'"}
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"


def test_the_page_is_asked_for_anew_and_its_files_are_kept_for_ever(live: Live) -> None:
    page = live.client.get("/")
    assert page.headers["cache-control"] == "no-cache"
    names = files_of(page)
    assert len(names) >= 4
    for name in ["", *names]:
        found = live.client.get(f"/{name}")
        assert found.status_code == 200
        assert ("immutable" in found.headers["cache-control"]) == bool(name)
        again = live.client.get(f"/{name}", headers={"if-none-match": f'"other", W/{found.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == found.headers["etag"]
        head = live.client.head(f"/{name}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(found.content))


def test_files_of_another_version_and_of_other_names_are_not_there(live: Live) -> None:
    version = files_of(live.client.get("/"))[0].split("/")[1]
    for path in ("0" * 16 + "/playground.js", f"{version}/app.py", f"{version}/index.html", f"{version}/..%2fapp.py"):
        found = live.client.get(f"/playground/{path}")
        assert (found.status_code, found.json()["error"]["code"]) == (404, "not_found")


def test_all_files_together_are_small_and_hold_nothing_from_elsewhere() -> None:
    contents = {path.name: path.read_text(encoding="utf-8") for path in STATIC.iterdir()}
    assert sum(map(len, contents.values())) < 200_000
    for name, content in contents.items():
        assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[\w/.]*", content)) <= {"http://www.w3.org/2000/svg"}, name
        assert "innerHTML" not in content and "insertAdjacentHTML" not in content and "eval(" not in content
    page = contents["index.html"]
    assert not re.search(r"<style|<script(?![^>]* src=)|\sstyle=|\son\w+=", page)
    assert not re.search(r'(?:src|href)="/', page)


def test_every_file_is_part_of_the_package() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = about["tool"]["setuptools"]["package-data"]["runtime.serving"]
    packed = {path for pattern in patterns for path in (STATIC.parent).glob(pattern)}
    assert packed == set(STATIC.iterdir())


def test_it_can_be_switched_off(serve: Callable[..., Live]) -> None:
    live = serve(playground=False)
    assert live.client.get("/").status_code == 404
    assert live.client.get("/health/live").status_code == 200
    for arguments, expected in ([], True), (["--no-playground"], False):
        assert settings_of(build_parser().parse_args(["engine.onnx", *arguments])).playground is expected


def test_it_works_under_a_prefix(generator: Generator) -> None:
    app = Starlette(routes=[Mount("/llm", create_app(generator, Settings(warm_up=False)))])
    live = Live(generator, app=app)
    try:
        page = live.client.get("/llm", follow_redirects=True)
        assert page.url.path == "/llm/"
        for name in files_of(page):
            assert live.client.get(page.url.join(name).path).status_code == 200
    finally:
        live.close()


def test_the_page_is_open_where_keys_are_asked_for_and_the_api_is_not(serve: Callable[..., Live]) -> None:
    live = serve(api_keys=("sk-1",))
    page = live.client.get("/")
    assert page.status_code == 200
    assert all(live.client.get(f"/{name}").status_code == 200 for name in files_of(page))
    assert live.client.get("/v1/models").status_code == 401
