"""Twenty grammars and regular expressions, each with a check of its own of whole texts."""

from __future__ import annotations

import re
from collections.abc import Callable

from runtime import Grammar

Check = Callable[[str], bool]
PATTERNS = {
    "a number": r"[0-9]{1,3}(\.[0-9]{2})?",
    "a date": r"20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
    "yes or no": r"(yes|no)",
    "words": r"[a-z]{1,6}( [a-z]{1,6}){0,2}",
    "a price": r"\$[1-9][0-9]{0,3}\.[0-9]{2}",
    "a call": r"(get|set)\([a-z]{1,4}(, [0-9]{1,2})?\)",
    "with slashes": r"/usr/(bin|lib)/[a-z]{1,5}",
    "with a line's end": r"a\nb\t[cd]",
    "letters beyond English": r"(Größe|naïve|漢字|🙂){1,2}",
    "any character": r"<.{0,6}>",
    "an answer first": r"Answer: (A|B|C|D)\.",
    "optional parts": r"(Dr\. )?(Ada|Alan)( (Lovelace|Turing))?",
}


def arithmetic(text: str) -> bool:
    """Return whether `text` is a sum of products of digits and parentheses."""
    return bool(re.fullmatch(r"[0-9+*()]+", text)) and _is_code(text)


def _is_code(text: str) -> bool:
    try:
        compile(re.sub(r"0+(?=[0-9])", "", text), "text", "eval")
    except SyntaxError:
        return False
    return True


def balanced(text: str) -> bool:
    """Return whether `text` is brackets that close, at least one pair."""
    while "()" in text or "[]" in text:
        text = text.replace("()", "").replace("[]", "")
        if not text:
            return True
    return False


def as_many(text: str) -> bool:
    """Return whether `text` is so many a's and as many b's."""
    return bool(text) and text == "a" * (len(text) // 2) + "b" * (len(text) // 2)


LARK: dict[str, tuple[str, Check]] = {
    "sums": (
        'start: term ("+" term)~0..2\nterm: factor ("*" factor)~0..1\nfactor: /[0-9]/ | "(" start ")"\n',
        arithmetic,
    ),
    "brackets": ('start: pair pair?\npair: "(" pair? ")" | "[" pair? "]"\n', balanced),
    "as many of both": ('start: "a" start? "b"\n', as_many),
    "a list of names": (
        'start: NAME (", " NAME)~0..2\nNAME: /[A-Z][a-z]{1,4}/\n',
        lambda text: bool(re.fullmatch(r"[A-Z][a-z]{1,4}(, [A-Z][a-z]{1,4}){0,2}", text)),
    ),
    "a query": (
        'start: "SELECT " col " FROM " /t[0-9]/ (" WHERE " col " = " /[0-9]{1,2}/)?\ncol: "a" | "b" | "*"\n',
        lambda text: bool(re.fullmatch(r"SELECT [ab*] FROM t[0-9]( WHERE [ab*] = [0-9]{1,2})?", text)),
    ),
    "two lines": (
        'start: "Thought: " /[a-z ]{1,8}/ "\\nAction: " ("go" | "stop")\n',
        lambda text: bool(re.fullmatch(r"Thought: [a-z ]{1,8}\nAction: (go|stop)", text)),
    ),
    "JSON within text": (
        'start: "<" obj ">"\nobj: %json {"type": "boolean"}\n',
        lambda text: text in ("<true>", "<false>"),
    ),
    "a palindrome of two letters": (
        'start: "x" start? "x" | "y" start? "y"\n',
        lambda text: bool(re.fullmatch(r"[xy]+", text)) and text == text[::-1],
    ),
}
GRAMMARS: dict[str, tuple[Grammar, Check]] = {
    **{
        name: (Grammar.regex(pattern), lambda text, pattern=pattern: bool(re.fullmatch(pattern, text)))  # type: ignore[misc]
        for name, pattern in PATTERNS.items()
    },
    **{name: (Grammar.lark(text), check) for name, (text, check) in LARK.items()},
}
