"""Options of requests, and processors of logits, that are odd; most of the others beside them are as they should be."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from runtime import Sampling, Tokens, TreeSizes
from tests.hostile.messages import HUGE, STOPS

VOCABULARY = 264

NUMBERS: st.SearchStrategy[Any] = st.one_of(
    HUGE,
    st.sampled_from((0, 1, -1, 0.5, 1.0, 0.01, 100.0, 1e-9, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))),
    st.sampled_from(
        (True, None, "1", b"1", [1], {}, 10**400, 2**63, 2**64, 1 + 2j, np.float32(0.5), np.int64(3), np.nan)
    ),
    st.floats(0, 2),
    st.integers(0, 300),
)
TOKENS = st.integers(0, VOCABULARY - 1)
VALID = {
    "temperature": st.one_of(st.just(0), st.floats(0.01, 3)),
    "top_k": st.one_of(st.none(), st.integers(1, 300)),
    "top_p": st.one_of(st.none(), st.floats(0.01, 1)),
    "min_p": st.one_of(st.none(), st.floats(0, 1)),
    "repetition_penalty": st.floats(0.01, 100),
    "presence_penalty": st.floats(-100, 100),
    "frequency_penalty": st.floats(-100, 100),
    "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4),
    "banned_tokens": st.one_of(st.lists(TOKENS, max_size=4), st.just(range(1, VOCABULARY))),
    "forced_tokens": st.dictionaries(st.integers(0, 5), TOKENS, max_size=3),
    "min_new_tokens": st.integers(0, 5),
    "seed": st.integers(0, 5),
    "logprobs": st.integers(0, 300),
}
ODD = st.one_of(
    NUMBERS,
    NUMBERS,
    st.lists(st.one_of(TOKENS, NUMBERS), max_size=4),
    st.dictionaries(st.one_of(st.integers(0, VOCABULARY + 2), HUGE), st.one_of(TOKENS, NUMBERS), max_size=4),
    st.sampled_from((None, "12", (), range(VOCABULARY), [[]], object, {"1": 2}, {None: 1}, {1.5: 2})),
)


@st.composite
def samplings(draw: st.DrawFn) -> dict[str, Any]:
    """Options that go together, mostly, one of which may be odd."""
    found = draw(st.fixed_dictionaries({}, optional=VALID))
    if not found.get("temperature"):
        # They have no meaning without.
        found = {name: value for name, value in found.items() if name not in ("top_k", "top_p", "min_p")}
    if draw(st.integers(0, 2)) == 0:
        found[draw(st.sampled_from(sorted(VALID)))] = draw(ODD)
    return found


TREES = st.one_of(
    st.just(TreeSizes(4, (4, 2, 2))),
    st.builds(TreeSizes, st.integers(0, 70), st.lists(st.integers(-1, 9), min_size=1, max_size=4).map(tuple)),
    st.builds(TreeSizes, NUMBERS, st.sampled_from((None, "111", (), (1, 1, 1), (None, 0, 0), [2, 0, 1]))),
    st.sampled_from((5, "x", (4, (4, 2, 2)))),
)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a request, one of which may be odd."""
    prediction = st.one_of(st.text(max_size=20), st.lists(TOKENS, max_size=9).map(Tokens))
    valid = {"max_new_tokens": st.integers(1, 9), "stop": STOPS, "ngrams": st.booleans(), "prediction": prediction}
    found = draw(st.fixed_dictionaries({}, optional=valid))
    if draw(st.integers(0, 3)) == 0:
        odd = {
            "max_new_tokens": NUMBERS,
            "stop": st.sampled_from((None, "a", [""], [1], ("a",), ["x"] * 100_000)),
            "tree": TREES,
            "prediction": ODD,
            "sampling": st.sampled_from((None, 5, {}, Sampling)),
        }
        name = draw(st.sampled_from(sorted(odd)))
        found[name] = draw(odd[name])
    return found


@dataclass
class Processor:
    """A processor that does so `what` at its call number `at`, and then returns its logits as they are."""

    what: str
    at: int
    calls: int = 0

    def again(self) -> Processor:
        """Return one that was not called."""
        return Processor(self.what, self.at)

    def __call__(self, tokens: Any, logits: Any) -> Any:
        self.calls += 1
        if self.calls <= self.at:
            return logits
        with contextlib.suppress(Exception):
            # What it may not do is refused in its own code; what it may, has no effect on others.
            self._change(tokens)
        return self._returned(logits)

    def _change(self, tokens: Any) -> None:
        if self.what == "appends a token":
            tokens.append(3)
        elif self.what == "changes a token":
            tokens[-1] = 3
        elif self.what == "clears the tokens":
            tokens.clear()
        elif self.what == "makes them writeable":
            tokens.setflags(write=True)
            tokens[:] = 3

    def _returned(self, logits: Any) -> Any:
        found = np.array(logits)
        results: dict[str, Any] = {
            "returns nothing": None,
            "returns a list": found.tolist(),
            "returns a text": "logits",
            "returns one fewer": found[:-1],
            "returns one more": np.append(found, 0),
            "returns two dimensions": found[None],
            "returns none": found[:0],
            "returns a number": 0.0,
            "returns NaN": np.full_like(found, np.nan),
            "returns some NaN": np.where(np.arange(len(found)) == 9, np.nan, found),
            "returns infinity": np.where(np.arange(len(found)) == 9, np.inf, found),
            "rules out all": np.full_like(found, -np.inf),
            "rules out all but one": np.where(np.arange(len(found)) == 9, found, -np.inf),
            "returns the largest": np.full_like(found, np.finfo(np.float32).max),
            "returns float64": found.astype(np.float64) * 1e300,
            "returns float16": found.astype(np.float16),
            "returns whole numbers": found.astype(np.int64),
            "returns booleans": found > 0,
            "returns texts": found.astype(str),
            "returns objects": found.astype(object),
            "returns complex numbers": found.astype(np.complex64),
            "returns a view": found[::-1][::-1],
            "returns fortran": np.asfortranarray(found),
            "doubles them in place": logits,
        }
        if self.what == "doubles them in place":
            logits *= 2
        return results.get(self.what, logits)


WHATS = (
    *(
        "appends a token",
        "changes a token",
        "clears the tokens",
        "makes them writeable",
        "returns nothing",
        "returns a list",
    ),
    *(
        "returns a text",
        "returns one fewer",
        "returns one more",
        "returns two dimensions",
        "returns none",
        "returns a number",
    ),
    *(
        "returns NaN",
        "returns some NaN",
        "returns infinity",
        "rules out all",
        "rules out all but one",
        "returns the largest",
    ),
    *(
        "returns float64",
        "returns float16",
        "returns whole numbers",
        "returns booleans",
        "returns texts",
        "returns objects",
    ),
    *("returns complex numbers", "returns a view", "returns fortran", "doubles them in place"),
)
