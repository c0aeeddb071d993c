"""`Sampling`: how the next token is chosen from the base model's logits, as asked for by the user.

What the options mean, and the order in which they act, is that of `generate` in transformers 5; presence and frequency
penalties, which it lacks, are those of the OpenAI API and of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.checks import number, whole
from runtime.errors import InputError, shown
from runtime.grammar import Grammar

# Takes the tokens so far, those of the prompt first, which it cannot change, and logits [V], which it may write into;
# returns logits [V].
LogitsProcessor = Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32]]

# Temperatures and repetition penalties: beyond these, float32 may overflow.
LEAST_FACTOR = 0.01
LARGEST_FACTOR = 100.0
# The most that may be added to a logit or, per token, subtracted.
LARGEST_SHIFT = 100.0
LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Options for choosing tokens. The defaults are greedy decoding. Options act in this order:

    - `logit_bias`, token -> what is added to its logit, -100 to 100.
    - `repetition_penalty`, 0.01 to 100: the logits of all tokens of the prompt and the answer are divided by it where
      they are positive and multiplied where they are negative (arXiv 1909.05858).
    - `presence_penalty` and `frequency_penalty`, -100 to 100: subtracted from the logits of the answer's tokens, once,
      and once for each time that the token has come.
    - `banned_tokens` cannot be chosen; the model's stop tokens not before there are `min_new_tokens` others.
    - `forced_tokens`, index of a new token, from 0 -> the token that it is.
    - `processors`: each is called exactly once for each token, in order, speculation or not, with the tokens so far
      (read-only; they grow as the answer does) and the logits [V], and returns logits [V]. It may keep state, of one
      request; -inf rules a token out.
    - `grammar`: all tokens are ruled out with which the answer could not become a text of it; those that end the answer
      until it is one. Then the answer ends by itself where nothing else may follow.
    - `temperature`, 0 (greedy: the most probable token, the smallest among equals) or 0.01 to 100: divides the logits.
    - `top_k` keeps the k most probable tokens, and all as probable as the last of them.
    - `top_p`, above 0 up to 1, keeps the most probable tokens up to the first with which their probabilities add up to
      `top_p`.
    - `min_p`, 0 to 1, keeps the tokens at least `min_p` times as probable as the most probable one.

    `seed`, 0 to 2**64 - 1, and the absolute position of a token decide how it is drawn; None takes a new seed for each
    request. Greedy decoding ignores it. `logprobs` asks for the log-probabilities of that many of the best tokens, and
    of the chosen one, in the base model's own distribution: that of its logits, before any of these options.

    Raises `InputError` for a value of another type or out of range, and for options that contradict each other.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_tokens: Sequence[int] = ()
    forced_tokens: Mapping[int, int] = field(default_factory=dict)
    min_new_tokens: int = 0
    processors: Sequence[LogitsProcessor] = ()
    grammar: Grammar | None = None
    seed: int | None = None
    logprobs: int = 0

    def __post_init__(self) -> None:
        # Plain numbers and own copies: what the caller does with theirs later does not matter.
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        if self.temperature == 0.0:
            for name in ("top_k", "top_p", "min_p"):
                if getattr(self, name) is not None:
                    raise InputError(
                        f"{name} has no meaning with temperature 0 (greedy); set a temperature above 0, or leave "
                        f"{name} out"
                    )
        for index, token in self.forced_tokens.items():
            if token in self.banned_tokens:
                raise InputError(
                    f"token {token} is in banned_tokens, and forced_tokens has it as new token {index}; leave it out "
                    "of one of them"
                )
        if self.grammar is not None:
            if not isinstance(self.grammar, Grammar):
                raise InputError(
                    f"grammar must be a runtime.Grammar such as Grammar.json_object(), not {shown(self.grammar)}"
                )
            for name in ("min_new_tokens", "forced_tokens"):
                if getattr(self, name):
                    raise InputError(
                        f"{name} cannot be had with a grammar, which says itself what the answer may be; leave one of "
                        "them out"
                    )

    def _checked(self) -> dict[str, Any]:
        temperature = number("temperature", self.temperature, 0.0, LARGEST_FACTOR)
        if 0.0 < temperature < LEAST_FACTOR:
            raise InputError(f"temperature must be 0 (greedy) or {LEAST_FACTOR} to 100, not {temperature}")
        top_p = None if self.top_p is None else number("top_p", self.top_p, 0.0, 1.0)
        if top_p == 0.0:
            raise InputError("top_p must be above 0, up to 1, not 0; top_k=1 keeps the most probable token alone")
        return {
            "temperature": temperature,
            "top_k": None if self.top_k is None else whole("top_k", self.top_k, 1),
            "top_p": top_p,
            "min_p": None if self.min_p is None else number("min_p", self.min_p, 0.0, 1.0),
            "repetition_penalty": number("repetition_penalty", self.repetition_penalty, LEAST_FACTOR, LARGEST_FACTOR),
            "presence_penalty": number("presence_penalty", self.presence_penalty, -LARGEST_SHIFT, LARGEST_SHIFT),
            "frequency_penalty": number("frequency_penalty", self.frequency_penalty, -LARGEST_SHIFT, LARGEST_SHIFT),
            "logit_bias": {
                whole("a token in logit_bias", token): number(
                    f"logit_bias of token {token}", bias, -LARGEST_SHIFT, LARGEST_SHIFT
                )
                for token, bias in _items("logit_bias", self.logit_bias)
            },
            "banned_tokens": tuple(
                whole("a token in banned_tokens", token)
                for token in _elements("banned_tokens", self.banned_tokens, "token ids")
            ),
            "forced_tokens": {
                whole("an index in forced_tokens", index): whole(f"forced token {index}", token)
                for index, token in _items("forced_tokens", self.forced_tokens)
            },
            "min_new_tokens": whole("min_new_tokens", self.min_new_tokens),
            "processors": _processors(self.processors),
            "seed": None if self.seed is None else whole("seed", self.seed, 0, LARGEST_SEED),
            "logprobs": whole("logprobs", self.logprobs),
        }


@dataclass(frozen=True, slots=True)
class TokenLogProbability:
    """The log-probabilities (natural logarithms) of the chosen token and of the best ones, best first: `best` has
    pairs of a token and its log-probability.
    """

    token: int
    log_probability: float
    best: list[tuple[int, float]]


def _elements(name: str, value: object, what: str) -> Iterable[object]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise InputError(f"{name} must be a list of {what}, not {shown(value)}")
    return value


def _items(name: str, value: object) -> Iterable[tuple[object, object]]:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a dictionary, not {shown(value)}")
    return value.items()


def _processors(value: object) -> tuple[object, ...]:
    processors = tuple(_elements("processors", value, "functions"))
    for processor in processors:
        if not callable(processor):
            raise InputError(
                f"processors must be functions of the tokens so far and the logits, not {shown(processor)}"
            )
    return processors
