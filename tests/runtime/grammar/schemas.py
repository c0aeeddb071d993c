"""A hundred JSON schemas of kinds that people use."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "maxLength": 12}
WHOLE: Schema = {"type": "integer", "minimum": 0, "maximum": 99}


def record(properties: Schema, *, optional: tuple[str, ...] = (), **more: Any) -> Schema:
    """Return the schema of an object with these properties and no others."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}


def rows(items: Schema, least: int = 0, most: int = 2) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def formatted(name: str) -> Schema:
    return {"type": "string", "format": name}


def matching(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


PLAIN: dict[str, Schema] = {
    "a boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "an integer": {"type": "integer"},
    "a number": {"type": "number"},
    "a short string": TEXT,
    "a string of one length": {"type": "string", "minLength": 3, "maxLength": 3},
    "an empty string": {"type": "string", "maxLength": 0},
    "a string or null": {"type": ["string", "null"], "maxLength": 8},
    "several types": {"type": ["integer", "boolean", "null"]},
    "a constant": {"const": "yes"},
    "a constant object": {"const": {"a": [1, 2.5, None], "b": "ü"}},
    "a constant with quotes": {"const": 'say "hi"\n'},
    "an enum of words": one_of("red", "green", "blue"),
    "an enum of numbers": one_of(1, 2, 30, -4),
    "an enum of all kinds": one_of("a", 1, None, True, {"b": []}),
    "an enum with a common beginning": one_of("in", "inner", "inner ear", "out"),
    "a string enum in a type": {"type": "string", "enum": ["N", "S", "E", "W"]},
    "true for an empty schema": {"anyOf": [{"type": "boolean"}, {"const": 0}]},
}
NUMBERS: dict[str, Schema] = {
    "at least": {"type": "integer", "minimum": 7},
    "at most": {"type": "integer", "maximum": -7},
    "a percentage": {"type": "integer", "minimum": 0, "maximum": 100},
    "above and below": {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 13},
    "a number between": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "a number above": {"type": "number", "exclusiveMinimum": 0},
    "a multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    "a multiple of a half": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 10},
    "a year": {"type": "integer", "minimum": 1900, "maximum": 2099},
    "a negative range": {"type": "integer", "minimum": -20, "maximum": -11},
}
FORMATS: dict[str, Schema] = {
    **{f"format {name}": formatted(name) for name in ("date", "time", "date-time", "duration", "uuid", "ipv4")},
    "format email": {**formatted("email"), "maxLength": 20},
    "format hostname": {**formatted("hostname"), "maxLength": 12},
    "format ipv6": formatted("ipv6"),
    "format uri": {**formatted("uri"), "maxLength": 30},
    "a date in an object": record({"born": formatted("date"), "at": formatted("time")}),
}
PATTERNS: dict[str, Schema] = {
    "a plate": matching("^[A-Z]{2}-[0-9]{1,4}$"),
    "a phone number": matching(r"^\+[1-9][0-9]{6,12}$"),
    "a colour": matching("^#[0-9a-f]{6}$"),
    "a slug": matching("^[a-z]+(-[a-z]+){0,3}$"),
    "a version": matching(r"^\d+\.\d+\.\d+$"),
    "an anchored choice": matching("^(yes|no|may ?be)$"),
    "hexadecimal in an object": record({"hash": matching("^[0-9a-f]{8}$")}),
    "a pattern with a bound": {**matching("^[a-z ]*$"), "maxLength": 9},
}
LISTS: dict[str, Schema] = {
    "a list of whole numbers": rows(WHOLE, 0, 4),
    "at least two": rows({"type": "boolean"}, 2, 3),
    "exactly three": rows(one_of("a", "b"), 3, 3),
    "an empty list": rows({}, 0, 0),
    "a pair": {"type": "array", "prefixItems": [TEXT, WHOLE], "items": False, "minItems": 2},
    "a head and more": {
        "type": "array",
        "prefixItems": [{"const": "head"}],
        "items": WHOLE,
        "minItems": 1,
        "maxItems": 3,
    },
    "lists of lists": rows(rows(WHOLE, 1, 2), 1, 2),
    "a matrix": rows(rows({"type": "boolean"}, 2, 2), 2, 2),
    "a list of records": rows(record({"id": WHOLE, "ok": {"type": "boolean"}}), 1, 2),
    "mixed items": rows({"anyOf": [WHOLE, one_of("x")]}, 1, 3),
    "a list of dates": rows(formatted("date"), 1, 2),
}
OBJECTS: dict[str, Schema] = {
    "a person": record({"name": TEXT, "age": WHOLE, "married": {"type": "boolean"}}),
    "a person with optional parts": record({"name": TEXT, "age": WHOLE, "nick": TEXT}, optional=("age", "nick")),
    "all optional": record({"a": WHOLE, "b": WHOLE, "c": WHOLE}, optional=("a", "b", "c")),
    "an empty object": record({}),
    "an address": record({"street": TEXT, "city": TEXT, "zip": matching("^[0-9]{5}$")}),
    "an order": record({"id": formatted("uuid"), "lines": rows(record({"sku": TEXT, "count": WHOLE}), 1, 2)}),
    "a nested record": record({"a": record({"b": record({"c": {"type": "boolean"}})})}),
    "deeper": record({"a": record({"b": record({"c": record({"d": record({"e": WHOLE})})})})}),
    "a null part": record({"parent": {"type": ["integer", "null"], "minimum": 0, "maximum": 9}, "id": WHOLE}),
    "a part of its own union": record({"value": {"anyOf": [{"type": "null"}, WHOLE, TEXT]}}),
    "a map of whole numbers": {"type": "object", "additionalProperties": WHOLE, "maxProperties": 2},
    "a map of records": {"type": "object", "additionalProperties": record({"x": WHOLE}), "maxProperties": 1},
    "names of a pattern": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,3}$": WHOLE},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "known names and more": {
        "type": "object",
        "properties": {"id": WHOLE},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 2,
    },
    "names with quotes and letters": record({'a "b"': WHOLE, "ü": WHOLE, "a b": WHOLE, "": WHOLE}),
    "names that begin alike": record({"in": WHOLE, "inner": WHOLE, "innermost": WHOLE}),
    "a weather report": record(
        {"place": TEXT, "degrees": {"type": "number", "minimum": -60, "maximum": 60}, "sky": one_of("clear", "cloudy")}
    ),
    "an event": record({"title": TEXT, "start": formatted("date-time"), "tags": rows(one_of("work", "home"), 0, 2)}),
    "a review": record({"stars": {"type": "integer", "minimum": 1, "maximum": 5}, "good": {"type": "boolean"}}),
    "a classification": record(
        {"label": one_of("spam", "ham"), "sure": {"type": "number", "minimum": 0, "maximum": 1}}
    ),
    "a point": record({"x": {"type": "number"}, "y": {"type": "number"}}),
    "a query": record({"field": one_of("name", "age"), "op": one_of("<", "=", ">"), "value": WHOLE}),
    "a configuration": record(
        {"debug": {"type": "boolean"}, "level": one_of("info", "error"), "port": {**WHOLE, "maximum": 65535}},
        optional=("debug",),
    ),
    "titles and examples": record(
        {"a": {**WHOLE, "title": "A", "description": "An a.", "examples": [1], "default": 2}}
    ),
}
UNIONS: dict[str, Schema] = {
    "any of two": {"anyOf": [WHOLE, one_of("none")]},
    "one of disjoint types": {"oneOf": [WHOLE, {"type": "boolean"}, {"type": "null"}]},
    "one of constants": {"oneOf": [{"const": "a"}, {"const": "b"}]},
    "told apart by a kind": {
        "anyOf": [record({"kind": {"const": "cat"}, "lives": WHOLE}), record({"kind": {"const": "dog"}, "good": TEXT})]
    },
    "one of, told apart by a kind": {
        "oneOf": [
            record({"kind": {"const": "circle"}, "radius": WHOLE}),
            record({"kind": {"const": "square"}, "side": WHOLE}),
        ]
    },
    "any of lists and records": {"anyOf": [rows(WHOLE), record({"a": WHOLE})]},
    "all of two bounds": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    "all of two records": {
        "allOf": [
            {"type": "object", "properties": {"a": WHOLE}, "required": ["a"]},
            {"type": "object", "properties": {"b": WHOLE}, "required": ["b"]},
        ],
        "properties": {"a": True, "b": True},
        "additionalProperties": False,
    },
    "any of in any of": {"anyOf": [{"anyOf": [{"const": 1}, {"const": 2}]}, {"anyOf": [{"const": "x"}]}]},
    "a union of enums": {"anyOf": [one_of("a", "b"), one_of(1, 2)]},
}
NODE = record({"value": WHOLE, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})
TREE = record({"name": one_of("leaf", "twig"), "children": rows({"$ref": "#/$defs/tree"}, 0, 1)})
REFERENCES: dict[str, Schema] = {
    "a definition": {**record({"home": {"$ref": "#/$defs/place"}}), "$defs": {"place": record({"city": TEXT})}},
    "old definitions": {**record({"a": {"$ref": "#/definitions/n"}}), "definitions": {"n": WHOLE}},
    "a linked list": {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    "a tree": {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}},
    "the root again": record({"v": WHOLE, "again": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}),
    "a definition used twice": {
        **record({"from": {"$ref": "#/$defs/p"}, "to": {"$ref": "#/$defs/p"}}),
        "$defs": {"p": rows(WHOLE, 2, 2)},
    },
    "mutual references": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": record({"b": {"anyOf": [{"$ref": "#/$defs/b"}, {"const": 0}]}}),
            "b": record({"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"const": 1}]}}),
        },
    },
    "an expression": {
        "$ref": "#/$defs/e",
        "$defs": {"e": {"anyOf": [WHOLE, record({"op": one_of("+", "*"), "of": rows({"$ref": "#/$defs/e"}, 1, 2)})]}},
    },
}
SCHEMAS: dict[str, Schema] = {
    **PLAIN,
    **NUMBERS,
    **FORMATS,
    **PATTERNS,
    **LISTS,
    **OBJECTS,
    **UNIONS,
    **REFERENCES,
}
