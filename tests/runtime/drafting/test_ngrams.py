from hypothesis import given
from hypothesis import strategies as st

from runtime.drafting.ngrams import LONGEST, SHORTEST, Continuation, Ngrams

# Few different tokens, so that they repeat; few enough of them that every place they repeat at is looked at.
texts = st.integers(1, 4).flatmap(lambda most: st.lists(st.integers(0, most), max_size=50))


def longest_match(text: list[int]) -> tuple[int, int]:
    """Return where the longest earlier match for the end of `text` ends, the latest of several, and its length."""
    found, longest = 0, 0
    for place in range(SHORTEST, len(text)):
        length = 0
        while length < min(place, LONGEST) and text[place - 1 - length] == text[len(text) - 1 - length]:
            length += 1
        if length >= max(SHORTEST, longest):
            found, longest = place, length
    return found, longest


@given(texts, st.integers(0, 12))
def test_a_continuation_is_what_followed_the_longest_match_the_latest_time(text: list[int], count: int) -> None:
    place, length = longest_match(text)
    found = Ngrams(text).continuation(count)
    assert found.matched == length
    assert list(found.tokens) == (text[place : place + count] if length else [])
    assert len(found.probabilities) == len(found.tokens)


@given(texts, st.lists(st.integers(0, 10)))
def test_a_text_may_come_in_pieces(text: list[int], lengths: list[int]) -> None:
    pieces = Ngrams()
    start = 0
    for length in lengths:
        pieces.extend(text[start : start + length])
        start += length
    pieces.extend(text[start:])
    assert pieces.tokens == text
    assert pieces.continuation(9) == Ngrams(text).continuation(9)


def test_a_text_that_repeats_one_token_goes_on_with_it() -> None:
    found = Ngrams([3] * 20).continuation(6)
    assert set(found.tokens) == {3}
    assert found.matched == LONGEST


def test_a_text_that_repeats_nothing_has_no_continuation() -> None:
    assert Ngrams(range(30)).continuation(5) == Continuation()
    assert Ngrams().continuation(5) == Continuation()


def test_a_match_is_of_two_tokens_at_least() -> None:
    assert SHORTEST == 2
    assert not Ngrams([1, 5, 2, 5]).continuation(3).tokens
    assert Ngrams([1, 5, 7, 2, 1, 5]).continuation(2).tokens == (7, 2)


@given(st.integers(SHORTEST, LONGEST + 3))
def test_trust_moves_towards_what_is_seen(matched: int) -> None:
    ngrams = Ngrams()
    guess = Continuation((7,), (ngrams.trust(matched),), matched)
    before = ngrams.trust(matched)
    ngrams.learn(guess, [7])
    assert ngrams.trust(matched) > before
    ngrams = Ngrams()
    ngrams.learn(guess, [8])
    assert ngrams.trust(matched) < before
    for _ in range(500):
        ngrams.learn(guess, [7])
    assert ngrams.trust(matched) > 0.95
    for _ in range(20_000):
        ngrams.learn(guess, [8])
    assert ngrams.trust(matched) < 0.05


def test_what_follows_a_wrong_guess_says_nothing_of_the_guesses_after_it() -> None:
    ngrams, other = Ngrams(), Ngrams()
    ngrams.learn(Continuation((1, 2, 3), (0.5,) * 3, SHORTEST), [1, 9, 3])
    other.learn(Continuation((1, 2), (0.5,) * 2, SHORTEST), [1, 9])
    assert [ngrams.trust(length) for length in range(SHORTEST, LONGEST)] == [
        other.trust(length) for length in range(SHORTEST, LONGEST)
    ]
    unchanged = Ngrams()
    ngrams = Ngrams()
    ngrams.learn(Continuation((1, 2, 3), (0.5,) * 3, SHORTEST), [1])
    assert ngrams.trust(SHORTEST) > unchanged.trust(SHORTEST)
    assert ngrams.trust(SHORTEST + 1) == unchanged.trust(SHORTEST + 1)


@given(st.lists(st.tuples(texts, texts), max_size=12))
def test_trust_is_a_probability_whatever_is_seen(seen: list[tuple[list[int], list[int]]]) -> None:
    ngrams = Ngrams()
    for text, followed in seen:
        ngrams.extend(text)
        ngrams.learn(ngrams.continuation(5), followed)
        assert all(0 < ngrams.trust(length) < 1 for length in range(SHORTEST, LONGEST + 5))
