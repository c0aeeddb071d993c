"""The example of `docs/architecture.md`: the tree of five candidates that its picture shows."""

from __future__ import annotations

from tests.modules import module_at

EXAMPLE = module_at("docs/draw_pass.py")
