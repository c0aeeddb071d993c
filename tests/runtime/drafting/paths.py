"""What tests ask of a tree of drafts."""

from __future__ import annotations

from runtime.tree import Tree


def likeliest(tree: Tree) -> list[int]:
    """Return the tokens of the path of the likeliest nodes, without the root."""
    path, node = [], 0
    while (child := next((n for n in range(node + 1, len(tree)) if tree.parents[n] == node), None)) is not None:
        path.append(int(tree.tokens[child]))
        node = child
    return path
