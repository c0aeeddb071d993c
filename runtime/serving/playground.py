"""The playground: one static page at `/`, its own files and no others, that chats and shows the trees of each pass."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.routing import Route

from runtime.serving.asgi import Message, Receive, Scope, Send, header
from runtime.serving.errors import ApiError
from runtime.serving.exchange import exchange_of

STATIC = Path(__file__).with_name("static")
PAGE = "index.html"
# In the page, for the folder that its files are under: one for each version of them, so that they may be kept for ever.
VERSION = b"{{version}}"
MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page's own scripts, styles, pictures and API, and nothing else: no code within the page, and no other host.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
SAFETY = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
ALWAYS_ASK, FOR_EVER = "no-cache", "public, max-age=31536000, immutable"


@dataclass(frozen=True)
class StaticFile:
    """A file of the page, as it is sent."""

    body: bytes
    media: str
    etag: str
    caching: str


class Page:
    """The page itself, which names the files of one version."""

    path = "/"

    def __init__(self, file: StaticFile) -> None:
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        exchange_of(scope).route = self.path
        await _send(self._file, scope, send)


class Files:
    """The page's files, under the name of their `version`."""

    path = "/playground/{version}/{name}"

    def __init__(self, version: str, files: Mapping[str, StaticFile]) -> None:
        self._version = version
        self._files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI. Raises `ApiError` for what is no file of this version."""
        exchange_of(scope).route = self.path
        found = self._files.get(scope["path_params"]["name"])
        if found is None or scope["path_params"]["version"] != self._version:
            raise ApiError(404, "there is no such file of the playground; load the page anew", code="not_found")
        await _send(found, scope, send)


def routes() -> list[Route]:
    """Return the routes of the page and of its files, which are read here, once."""
    contents = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir()) if path.suffix in MEDIA}
    version = hashlib.sha256(b"".join(name.encode() + body for name, body in contents.items())).hexdigest()[:16]
    page = Page(_static(PAGE, contents.pop(PAGE).replace(VERSION, version.encode()), ALWAYS_ASK))
    files = Files(version, {name: _static(name, body, FOR_EVER) for name, body in contents.items()})
    return [Route(Page.path, page, methods=["GET"]), Route(Files.path, files, methods=["GET"])]


def _static(name: str, body: bytes, caching: str) -> StaticFile:
    return StaticFile(body, MEDIA[Path(name).suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"', caching)


async def _send(file: StaticFile, scope: Scope, send: Send) -> None:
    headers = {"etag": file.etag, "cache-control": file.caching, **SAFETY}
    given = header(scope, b"if-none-match") or b""
    known = file.etag in [one.strip().removeprefix("W/") for one in given.decode("latin-1").split(",")]
    if not known:
        headers |= {"content-type": file.media, "content-length": str(len(file.body))}
    start: Message = {
        "type": "http.response.start",
        "status": 304 if known else 200,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await send(start)
    await send({"type": "http.response.body", "body": b"" if known or scope["method"] == "HEAD" else file.body})
