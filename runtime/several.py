"""Several prompts, or several answers to each, in one call: what of its arguments is for which."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, cast

from runtime.errors import InputError, shown
from runtime.prompts import Prompt, Tokens
from runtime.sampling import Sampling

# As many answers to one prompt as anybody reads.
MOST_ANSWERS = 1024


def sampling_of_answers(sampling: Sampling | None, count: int) -> list[Sampling | None]:
    """Return the sampling of each of `count` answers to one prompt: with a seed given, that and those after it."""
    if not isinstance(sampling, Sampling) or sampling.seed is None:
        # What is no sampling is refused with the rest of the request.
        return [sampling] * count
    found: list[Sampling | None] = []
    for index in range(count):
        # Checked once: biases of many tokens take their time.
        one = copy(sampling)
        object.__setattr__(one, "seed", (sampling.seed + index) % (1 << 64))
        found.append(one)
    return found


def predictions_of(given: object, prompts: int | None) -> list[Any]:
    """Return the prediction of each of so many `prompts`, None for a prompt that is not in a list. Raises `InputError`
    for a list of another length.
    """
    several = isinstance(given, list | tuple) and not isinstance(given, Tokens)
    if prompts is None or not several:
        return [given] * (prompts or 1)
    found = list(cast(Sequence[Any], given))
    if len(found) != prompts:
        raise InputError(
            f"there are {len(found)} predictions for {prompts} prompts; give one for each, which may be None, or one "
            "for all"
        )
    return found


def prompts_of(given: object) -> list[Prompt] | None:
    """Return the prompts where `given` is a list of several, None where it is one. Raises `InputError` for a mixture.

    A string, a list of messages and `Tokens` are one prompt each.
    """
    if isinstance(given, (str, Tokens)) or not isinstance(given, (list, tuple)):
        return None
    if not given:
        raise InputError("there is no prompt in an empty list; give messages, or at least one prompt")
    if all(isinstance(one, dict) for one in given):
        return None
    if any(isinstance(one, dict) for one in given):
        raise InputError(
            "a list of messages is one prompt, and this one has other things among them; give several prompts as a "
            "list of strings, of lists of messages or of Tokens"
        )
    for index, one in enumerate(given):
        if isinstance(one, bool) or not isinstance(one, (str, list, tuple, Tokens)):
            hint = "; wrap token ids in runtime.Tokens([...])" if isinstance(one, int) else ""
            raise InputError(
                f"prompt {index} of the list is {shown(one)}, and must be a string, a list of messages or Tokens{hint}"
            )
    return list(given)
