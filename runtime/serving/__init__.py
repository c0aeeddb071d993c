"""An OpenAI-compatible HTTP server on a `Generator`: `create_app` makes an ASGI application, `ht-serve` runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.serving.app import create_app
    from runtime.serving.settings import Settings

__all__ = ["Settings", "create_app"]

# What the extra has that the runtime does without.
NEEDED = ("starlette", "uvicorn", "prometheus_client")
INSTALL = "pip install 'hidden-transfer[serve]'"


def __getattr__(name: str) -> object:
    """Return the public `name`, importing the web framework when it is asked for."""
    try:
        if name == "create_app":
            from runtime.serving.app import create_app

            return create_app
        if name == "Settings":
            from runtime.serving.settings import Settings

            return Settings
    except ModuleNotFoundError as error:
        needed = (error.name or "").partition(".")[0]
        if needed not in NEEDED:
            raise
        told = f"{needed} is not installed, and a server needs it; install it with: {INSTALL}"
        raise ModuleNotFoundError(told, name=error.name) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
