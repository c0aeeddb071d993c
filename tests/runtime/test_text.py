import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runtime.text import TextStream
from tests.conftest import byte_tokenizer
from tests.runtime.tokenizers import KINDS, tokenizer_of

TOKENIZER = byte_tokenizer().backend_tokenizer


def stream(tokens: list[int], stop: list[str]) -> tuple[list[str], TextStream]:
    text = TextStream(TOKENIZER, stop)
    parts = []
    for token in tokens:
        parts.append(text.push(token))
        if text.stopped:
            break
    return [*parts, text.finish()], text


@given(st.text(max_size=30))
@example("a🙂b漢字é")
def test_parts_are_whole_characters_and_add_up_to_the_text(text: str) -> None:
    parts, done = stream(TOKENIZER.encode(text).ids, [])
    assert "".join(parts) == done.text == text
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


@given(st.lists(st.integers(0, 260), max_size=30))
def test_any_tokens_give_the_text_that_the_tokenizer_gives(tokens: list[int]) -> None:
    parts, done = stream(tokens, [])
    assert "".join(parts) == done.text == TOKENIZER.decode(tokens, skip_special_tokens=True)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_and_none_of_it_is_ever_released(text: str, stop: list[str]) -> None:
    parts, done = stream(TOKENIZER.encode(text).ids, stop)
    completions = [
        (end, text.index(s, end - len(s))) for s in stop for end in range(len(text) + 1) if text[:end].endswith(s)
    ]
    if completions:
        first_end = min(end for end, _ in completions)
        expected = text[: min(start for end, start in completions if end == first_end)]
    else:
        expected = text
    assert "".join(parts) == done.text == expected
    assert done.stopped == bool(completions)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_special_tokens_that_are_shown_are_in_the_text_and_the_others_are_not(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    shown = tokenizer.token_to_id("<|im_start|>")
    text = "Hello <|im_start|> fox 🙂<|im_end|> and<|im_start|>dogs</s>"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert shown in tokens
    stream = TextStream(tokenizer, shown=[shown])
    found = "".join(stream.push(token) for token in tokens) + stream.finish()
    assert found == stream.text
    assert found.count("<|im_start|>") == 2
    assert "<|im_end|>" not in found and "</s>" not in found
