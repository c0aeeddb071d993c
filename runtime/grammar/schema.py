"""JSON schemas made ready for llguidance: what it would read in another way than the specification is refused."""

from __future__ import annotations

import json
from typing import Any

from runtime.errors import InputError, one_line

# Schemas within schemas; those of people have some ten.
DEEPEST = 64
# Keywords whose values are not schemas, whatever they look like.
PLAIN = frozenset({"const", "enum", "default", "examples", "example", "x-guidance"})
# Keywords whose values are objects of schemas by name.
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
# Strings have one spelling: with others, such as \u0061, a property could come twice.
ESCAPES = 'nrbtf\\"'
# Dates that there are, and times without leap seconds, which most readers refuse: llguidance is laxer. The years with a
# 29th of February are multiples of 4, of centuries those of 400.
LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
DAY = "(?:0[1-9]|1[0-9]|2[0-8])"
MONTHS = f"(?:0[1-9]|1[0-2])-{DAY}|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31"
DATE = f"(?:(?:[0-9]{{3}}[1-9]|[1-9][0-9]{{3}}|0[1-9][0-9]{{2}}|00[1-9][0-9])-(?:{MONTHS})|{LEAP}-02-29)"
TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
FORMATS = {"date": f"^{DATE}$", "time": f"^{TIME}", "date-time": f"^{DATE}T{TIME}"}
# Options of llguidance that leave an answer JSON that fits the schema.
OPTIONS = frozenset({"whitespace_flexible"})


def prepared(text: str) -> str:
    """Return the schema `text` with the options that it is compiled with. Raises `InputError` for what llguidance would
    not hold to.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the schema is not JSON ({one_line(error)})") from error
    if not isinstance(schema, dict | bool):
        raise InputError("a JSON schema must be an object, true or false; give one")
    options: dict[str, Any] = {}
    if isinstance(schema, dict):
        options = schema.pop("x-guidance", {})
        if not isinstance(options, dict) or options.keys() - OPTIONS:
            raise InputError(f"x-guidance may have {', '.join(OPTIONS)} and nothing else; leave the rest out")
    _check(schema)
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    schema["x-guidance"] = {**options, "json_allowed_escapes": ESCAPES, "lenient": False, "coerce_one_of": False}
    return json.dumps(schema, separators=(",", ":"))


def _check(schema: object) -> None:
    # Without recursion: it may be nested as deeply as JSON is read.
    left: list[tuple[object, int]] = [(schema, 0)]
    while left:
        one, depth = left.pop()
        if depth > DEEPEST:
            raise InputError(f"the schema is nested deeper than {DEEPEST} schemas; give a flatter one")
        if isinstance(one, list):
            left += [(each, depth + 1) for each in one]
        elif isinstance(one, dict):
            _check_one(one)
            for keyword, value in one.items():
                if keyword in NAMED and isinstance(value, dict):
                    left += [(each, depth + 1) for each in value.values()]
                elif keyword not in PLAIN:
                    left.append((value, depth + 1))


def _check_one(schema: dict[str, Any]) -> None:
    least, required = schema.get("minProperties"), schema.get("required")
    if isinstance(least, int) and least > 1:
        names = set(map(str, required)) if isinstance(required, list) else set()
        if len(names) < least:
            raise InputError(
                f"minProperties {least} cannot be honoured: other properties than those required may come twice; "
                "require as many by name, or leave it out"
            )
    if isinstance(schema.get("items"), list):
        raise InputError("items cannot be a list since draft 2020-12; use prefixItems")
    for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(keyword), bool):
            raise InputError(f"{keyword} is a number since draft 6; give the bound in it")
    if pattern := FORMATS.get(str(schema.get("format"))):
        if "pattern" not in schema:
            schema["pattern"] = pattern
        elif isinstance(schema.setdefault("allOf", []), list):
            schema["allOf"].append({"pattern": pattern})
