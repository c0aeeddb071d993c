"""Files of prompts, read, thinned and without duplicates."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ht_export.prompts import Conversation, evenly, read_conversations, without_duplicates
from runtime.errors import InputError


@given(st.lists(st.lists(st.sampled_from(["a", "A ", " a b", "b"]), min_size=1, max_size=2)))
def test_what_is_kept_is_distinct_and_in_order(turns: list[list[str]]) -> None:
    conversations = [Conversation(str(i), "", tuple(t)) for i, t in enumerate(turns)]
    kept = without_duplicates(conversations)
    assert len({c.words for c in kept}) == len(kept) == len({c.words for c in conversations})
    assert [c for c in conversations if c in kept] == kept


def test_conversations_that_differ_after_the_turns_answered_are_duplicates() -> None:
    conversations = [Conversation("0", "", ("a", "b")), Conversation("1", "", ("A", "c"))]
    assert without_duplicates(conversations, max_turns=1) == conversations[:1]
    assert without_duplicates(conversations, max_turns=2) == conversations


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        ('{"prompt": "a"}\n\n{"text": "b"}\n', "line 3: needs 'prompt'"),
        ('["a"]\n', "line 1: needs 'prompt'"),
        ('{"turns": "abc"}\n', "line 1: needs 'prompt'"),
        ('{"turns": {"a": 1}}\n', "line 1: needs 'prompt'"),
        ('{"turns": ["a", 1]}\n', "line 1: needs 'prompt'"),
        ('{"turns": []}\n', "line 1: needs 'prompt'"),
        ('{"prompt": " "}\n', "line 1: needs 'prompt'"),
        ('{"prompt": "a"}\n{"prompt": "\udcff"}\n', "line 2: not valid JSON"),
        ('{"prompt": "a\\ud800"}\n', "line 1: not valid JSON"),
        ("\n", "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_read_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        read_conversations(path)


def test_prompts_may_hold_any_line_separator(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"turns": ["one\u2028two\x85three", "next"]}, ensure_ascii=False) + "\n")
    assert [c.turns for c in read_conversations(path)] == [("one\u2028two\x85three", "next")]


@given(st.integers(1, 30), st.integers(1, 40))
def test_prompts_are_taken_evenly_and_in_order(given_prompts: int, count: int) -> None:
    prompts = [Conversation(str(i), "", ("text",)) for i in range(given_prompts)]
    places = [int(prompt.id) for prompt in evenly(prompts, count)]
    assert len(places) == min(count, given_prompts)
    assert places[0] == 0
    gaps = [after - before for before, after in pairwise(places)]
    assert all(gap >= 1 for gap in gaps)
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
