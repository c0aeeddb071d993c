"""Passes as streams tell of them: the trees that were verified, with the texts of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from runtime.serving.pieces import Pieces
from runtime.serving.replies import NewToken, TreeNode, VerifiedPass
from runtime.trace import Pass


def passes_of(passes: Sequence[Pass] | None, pieces: Pieces) -> list[VerifiedPass] | UnsetType:
    """Return what a chunk tells of its passes; nothing where no trace was asked for."""
    if passes is None:
        return UNSET
    return [
        VerifiedPass(
            one.prompt,
            one.rows,
            list(one.pseudo_rows),
            one.seconds,
            [
                TreeNode(node.token, pieces.of(node.token).text, node.parent, node.probability, list(node.sources))
                for node in one.nodes
            ],
            list(one.accepted),
            [NewToken(token, pieces.of(token).text, text) for token, text in zip(one.tokens, one.texts, strict=True)],
        )
        for one in passes
    ]
