"""Files of prompts, read, thinned and without duplicates."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ht_export.prompts import PROMPTS, Conversation, evenly, read_conversations, without_duplicates
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
        ('{"prompt": "a"}\n{"prompt": \n', r"line 2 is not a valid prompt \(Input data was truncated"),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"line 1 .*'messages' are not read: give the user's as"),
        ('{"prompt": "a"}\n\n{"text": "b"}\n', r"line 3 is not a valid prompt \(it needs 'prompt' \(a string\) or"),
        ('["a"]\n', "line 1 is not a valid prompt .*Expected `object`"),
        ('{"turns": "abc"}\n', r"line 1 is not .*`\$\.turns`, which is 'abc'"),
        ('{"turns": {"a": 1}}\n', r"line 1 is not .*`\$\.turns`"),
        ('{"turns": ["a", 1]}\n', r"line 1 is not .*`\$\.turns\[1\]`, which is 1"),
        ('{"turns": ["a", null]}\n', r"line 1 is not .*`\$\.turns\[1\]`, which is None"),
        ('{"turns": []}\n', "line 1 is not .*needs 'prompt'"),
        ('{"turns": ["a", " "]}\n', "line 1 is not .*needs 'prompt'"),
        ('{"prompt": " "}\n', "line 1 is not .*needs 'prompt'"),
        ('{"prompt": 1}\n', r"line 1 is not .*`\$\.prompt`, which is 1"),
        ('{"prompt": "a", "id": ["b"]}\n', r"line 1 is not .*`\$\.id`"),
        ('{"prompt": "a", "task": {"b": "c"}}\n', r"line 1 is not .*`\$\.task`"),
        ('{"prompt": "a", "x": NaN}\n', r"line 1 is not .*malformed.*NaN"),
        ('{"prompt": "a", "id": 1' + "0" * 5000 + "}\n", "line 1 is not .*out of range"),
        ('{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 1 is not .*nested too deeply"),
        ('{"prompt": "a"}\n{"prompt": "\udcff"}\n', "line 2 is not .*(decode|encoded)"),
        ('{"prompt": "a\\ud800"}\n', "line 1 is not"),
        ('{"prompt": "a\\udc00b"}\n', "line 1 is not"),
        ("\n", "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_read_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        read_conversations(path)


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a"}\n{"prompt": "')
        # A file of holes: no disk has it, and no memory should.
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"line 2 is not a valid prompt \(it has more than \d+ bytes\)"):
        read_conversations(path)


def test_a_file_is_not_read_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a"}\n\nno JSON\n')
        file.truncate(1 << 40)
    lines = PROMPTS.lines(path)
    assert next(lines)[0] == 1
    with pytest.raises(InputError, match=r"line 3 is not a valid prompt"):
        next(lines)


def test_ids_and_tasks_may_be_numbers_and_a_line_without_an_id_has_its_number(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows: list[dict[str, object]] = [
        {"id": 7, "task": 3},
        {"id": 0.5},
        {"id": 10**30},
        {"id": None, "task": True},
        {"category": {"x": [1]}},
    ]
    path.write_text("".join(json.dumps({"prompt": "a", **row}) + "\r\n\n" for row in rows) + '{"prompt": "end"}')
    found = read_conversations(path)
    assert [one.id for one in found] == ["7", "0.5", str(10**30), "7", "9", "11"]
    assert [one.task for one in found] == ["3", "", "", "True", "", ""]


def test_a_prompt_goes_before_turns(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "turns": ["b"]}\n{"prompt": "", "turns": ["b"]}\n{"prompt": null, "turns": ["c"]}')
    assert [one.turns for one in read_conversations(path)] == [("a",), ("b",), ("c",)]


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
