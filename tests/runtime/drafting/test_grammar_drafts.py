"""Trees within a grammar: nothing that it forbids, what it forces, and a matcher that is where it was."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="llguidance is not installed")

from hypothesis import given
from hypothesis import strategies as st

from runtime import Grammar, InputError
from runtime.drafting.grammar_drafts import GrammarDrafts
from runtime.grammar.compiler import Compiler, Vocabulary
from runtime.grammar.matcher import MOST_FORCED, Matcher
from runtime.tree import Tree, candidate_path, root_alone

PIECES = [b"</s>", b"a", b"b", b"ab", b"abc", b"c", b"d", b"de", b"x", b"y", b"", b"<tag>", b"e"]
END, TAG, EMPTY = 0, 11, 10
ROOT = 8


def encode(text: str) -> list[int]:
    """Return the longest pieces of `text`, one after the other."""
    found = []
    while text:
        number = max(
            (n for n, piece in enumerate(PIECES) if piece and text.encode().startswith(piece)),
            key=lambda n: len(PIECES[n]),
        )
        found.append(number)
        text = text[len(PIECES[number]) :]
    return found


COMPILER = Compiler(lambda: Vocabulary(PIECES, [END, TAG], [END], encode))


def matcher(pattern: str) -> Matcher:
    return COMPILER.matcher(Grammar.regex(pattern))


def names(tree: Tree) -> list[tuple[bytes, ...]]:
    """Return the path to each node but the root."""
    paths: list[tuple[bytes, ...]] = [()]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        paths.append((*paths[parent], PIECES[token]))
    return paths[1:]


def allowed(found: Matcher) -> set[int]:
    return set(np.flatnonzero(found.allowed()).tolist())


def test_all_tokens_that_go_on_are_allowed_and_the_end_where_the_text_may_end() -> None:
    found = matcher("abc?")
    assert allowed(found) == {1, 3, 4}
    found.accept(3)
    assert allowed(found) == {END, 5}
    assert not found.complete
    found.accept(5)
    assert found.complete
    assert allowed(found) == {END}


def test_special_and_empty_tokens_are_no_text() -> None:
    assert not {TAG, EMPTY, END} & allowed(matcher(".+"))
    with pytest.raises(InputError, match="no token of this model goes on in the grammar after 0 tokens"):
        matcher("<tag>")


def test_a_space_that_the_tokenizer_drops_does_not_begin_an_answer() -> None:
    pieces = [b"</s>", b" a", b"a", b" ", b"b"]
    compiler = Compiler(lambda: Vocabulary(pieces, [], [0], lambda text: [], changed_first=[1, 3]))
    found = compiler.matcher(Grammar.regex(" ?a b"))
    assert allowed(found) == {2}
    found.accept(2)
    assert allowed(found) == {3}


def test_a_tokenizer_without_an_end_ends_where_nothing_may_follow() -> None:
    compiler = Compiler(lambda: Vocabulary([b"a", b"b"], [], [], lambda text: []))
    found = compiler.matcher(Grammar.regex("ab"))
    found.accept(0)
    assert allowed(found) == {1}
    found.accept(1)
    assert found.complete


def test_what_is_forbidden_is_left_out_and_the_rest_gains_its_odds() -> None:
    #       x -> a 0.4 (-> b 0.2), y 0.5
    tree = Tree(
        np.array([ROOT, 9, 1, 2]), np.array([-1, 0, 0, 2]), np.array([0, 1, 1, 2]), np.array([1, 0.5, 0.4, 0.2])
    )
    shaped, _ = GrammarDrafts(matcher("[abc]*"), forced=False).shape(tree, 8)
    assert names(shaped) == [(b"a",), (b"a", b"b")]
    assert shaped.probabilities.tolist() == pytest.approx([1.0, 0.8, 0.4])


def test_what_is_forced_is_drafted_at_the_root_and_below_other_drafts() -> None:
    drafts = GrammarDrafts(matcher("abcde(x|y)abcde"))
    shaped, _ = drafts.shape(root_alone(ROOT), 8)
    assert names(shaped) == [(b"abc",), (b"abc", b"de")]
    found = matcher("(x|y)abcde")
    shaped, _ = GrammarDrafts(found).shape(candidate_path(ROOT, [9], [0.5]), 8)
    assert names(shaped) == [(b"y",), (b"y", b"abc"), (b"y", b"abc", b"de")]
    assert allowed(found) == {8, 9}


def test_nodes_that_are_forced_are_told_apart_whoever_proposed_them() -> None:
    proposed = candidate_path(ROOT, [9, 4, 6], [0.5, 0.5, 0.5])
    shaped, forced = GrammarDrafts(matcher("(x|y)abc(d|x)?")).shape(proposed, 8)
    assert {names(shaped)[node - 1] for node in forced} == {(b"y", b"abc")}
    assert GrammarDrafts(matcher("(x|y)abc"), forced=False).shape(proposed, 8)[1] == frozenset()


def test_trust_in_forced_tokens_is_learned() -> None:
    found = matcher("(abc){30}")
    drafts = GrammarDrafts(found)
    before = drafts.shape(root_alone(ROOT), 3)[0].probabilities[1]
    for token in (1, 2, 5) * 5:
        # The model spells it otherwise.
        found.accept(token)
        drafts.accept([token])
        drafts.shape(root_alone(token), 3)
    assert drafts.shape(root_alone(ROOT), 3)[0].probabilities[1] < before


def test_nothing_is_drafted_after_the_end() -> None:
    found = matcher("ab")
    shaped, _ = GrammarDrafts(found).shape(candidate_path(ROOT, [3, END, 1], [0.9, 0.9, 0.9]), 8)
    assert names(shaped) in ([(b"ab",)], [(b"ab",), (b"ab", b"</s>")])


def test_siblings_that_have_more_than_1_together_end_too() -> None:
    # Three that the grammar forbids, and what is left of 1 is less than the fourth has.
    tree = Tree(
        np.array([ROOT, 2, 5, 6, 1]),
        np.array([-1, 0, 0, 0, 0]),
        np.array([0, 1, 1, 1, 1]),
        np.array([1, 0.4, 0.39, 0.38, 0.37]),
    )
    shaped, _ = GrammarDrafts(matcher("abcde(x|y)+"), forced=False).shape(tree, 11)
    assert names(shaped) == [(b"a",)]
    assert shaped.probabilities.tolist() == [1.0, 1.0]


GRAMMARS = ["[abc]*", "(ab|abc|de)*x?", "abcde(x|y)+", "(a|b){2}(c|de){1,3}", ".{0,4}", "a(bcd)*e|xy"]
TOKENS = st.integers(0, len(PIECES) - 1)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Draw a tree of falling probabilities, whose siblings are different tokens."""
    tokens, parents, depths, paths = [ROOT], [-1], [0], [1.0]
    for _ in range(draw(st.integers(0, 14))):
        parent, token = draw(st.integers(0, len(tokens) - 1)), draw(TOKENS)
        if any(p == parent and t == token for p, t in zip(parents, tokens, strict=True)):
            continue
        tokens.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        paths.append(paths[parent] * draw(st.floats(0.01, 0.4)))
    order = sorted(range(len(paths)), key=lambda node: (-paths[node], depths[node]))
    new = {node: place for place, node in enumerate(order)}
    return Tree(
        np.array([tokens[n] for n in order]),
        np.array([-1, *(new[parents[n]] for n in order[1:])]),
        np.array([depths[n] for n in order]),
        np.array([paths[n] for n in order]),
    )


@given(st.sampled_from(GRAMMARS), st.lists(TOKENS, max_size=6), trees(), st.integers(1, 12), st.booleans())
def test_a_shaped_tree_is_a_tree_of_what_the_grammar_allows(
    pattern: str, wanted: list[int], tree: Tree, rows: int, forced: bool
) -> None:
    found, fresh = matcher(pattern), matcher(pattern)
    taken = []
    for token in wanted:
        if found.allows(token) and token != END:
            found.accept(token)
            taken.append(token)
    shaped, _ = GrammarDrafts(found, forced=forced).shape(tree, rows)
    # The matcher is where it was: as a fresh one that was fed the same.
    for token in taken:
        fresh.accept(token)
    assert (allowed(found), found.complete) == (allowed(fresh), fresh.complete)
    assert len(shaped) <= rows
    assert shaped.tokens[0] == ROOT
    assert (np.diff(shaped.probabilities) <= 0).all()
    assert all(parent < node for node, parent in enumerate(shaped.parents.tolist()))
    children = list(zip(shaped.parents.tolist(), shaped.tokens.tolist(), strict=True))
    assert len(set(children)) == len(children)
    for node in range(1, len(shaped)):
        assert shaped.depths[node] == shaped.depths[shaped.parents[node]] + 1
        way, at = [], node
        while at:
            way.append(int(shaped.tokens[at]))
            at = int(shaped.parents[at])
        for count, token in enumerate(reversed(way)):
            assert fresh.allows(token), (pattern, taken, way)
            if count < len(way) - 1:
                fresh.push(token)
        fresh.pop(len(way) - 1)
    if not forced and rows == 12 and len(tree) <= 12:
        # All that is allowed is there.
        kept = set(names(shaped))
        for way_there in names(tree):
            parts = [PIECES.index(name) for name in way_there]
            if _fits(fresh, parts):
                assert way_there in kept


def _fits(found: Matcher, tokens: list[int]) -> bool:
    pushed = 0
    for token in tokens:
        if not found.allows(token):
            break
        found.push(token)
        pushed += 1
    found.pop(pushed)
    return pushed == len(tokens)


def test_tokens_of_a_forced_text_spell_it_whatever_the_tokenizer_adds() -> None:
    pieces = [b"</s>", b" a", b"a", b"b", b"\n", b" "]

    def with_space(text: str) -> list[int]:
        """As tokenizers that put a space before a text, but not after a line's end."""
        text = text if text.startswith("\n") else " " + text
        return [pieces.index(character.encode()) for character in text]

    compiler = Compiler(lambda: Vocabulary(pieces, [], [0], with_space))
    assert compiler.matcher(Grammar.regex("aab")).forced() == (2, 2, 3)
    broken = Compiler(lambda: Vocabulary(pieces, [], [0], lambda text: [3] * len(text)))
    assert broken.matcher(Grammar.regex(" aab")).forced() == (1, 2, 3)


def test_copies_of_a_matcher_go_their_own_ways() -> None:
    one, other = matcher("(a|b)(c|d)"), matcher("(a|b)(c|d)")
    one.accept(1)
    for token, _ in itertools.product((5, 6), range(2)):
        assert not other.allows(token)
    assert allowed(other) == {1, 2}


def test_of_a_long_forced_text_the_beginning_is_made_tokens() -> None:
    asked: list[str] = []

    def told(text: str) -> list[int]:
        asked.append(text)
        return encode(text)

    compiler = Compiler(lambda: Vocabulary(PIECES, [END, TAG], [END], told))
    found = compiler.matcher(Grammar.regex("x(abcde){4000}"))
    forced = found.forced()
    assert forced[:3] == (8, 4, 7)
    assert forced == tuple(encode("x" + "abcde" * 4000))[: len(forced)]
    assert len(forced) > 300
    assert max(map(len, asked)) <= MOST_FORCED


def test_a_long_forced_text_is_not_cut_within_a_character() -> None:
    pieces = [b"</s>", "ä".encode(), "€".encode(), b"a"]

    def told(text: str) -> list[int]:
        return [pieces.index(character.encode()) for character in text]

    compiler = Compiler(lambda: Vocabulary(pieces, [0], [0], told))
    for start in ("", "a", "aa"):
        for character in (1, 2):
            text = start + pieces[character].decode() * 1000
            forced = compiler.matcher(Grammar.regex(text)).forced()
            assert len(forced) > 300
            assert forced == tuple(told(text))[: len(forced)]
