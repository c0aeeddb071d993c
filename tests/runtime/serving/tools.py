"""Tools that tests have called, and answers that call them as each kind of model writes it."""

from __future__ import annotations

import json
from typing import Any

from jsonschema_rs import validator_for

from tests.runtime.serving.live import Live
from tests.runtime.tools.speaking import LLAMA, MISTRAL, PLAIN, QWEN, Speaking

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
ADD: dict[str, Any] = {
    "type": "object",
    "properties": {"a": NUMBER, "b": NUMBER},
    "required": ["a", "b"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "add": ADD}


def tool(kind: str, **more: Any) -> Any:
    about = {"name": kind, "description": "d", "parameters": SCHEMAS[kind], **more}
    return {"type": "function", "function": about}


TOOLS = [tool("get_weather"), tool("add")]
HELLO: Any = [{"role": "user", "content": "Hello"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 300, "tools": TOOLS}
REQUIRED: Any = {**GREEDY, "tool_choice": "required"}
RUN: dict[str, Any] = {"get_weather": lambda city, unit: f"20 degrees {unit} in {city}", "add": lambda a, b: str(a + b)}
PARIS = '{"city": "Paris", "unit": "celsius"}'
SUM = '{"a": 1, "b": 2}'
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": (PLAIN, ()),
    "qwen": (QWEN, ("<tool_call>", "</tool_call>")),
    "llama": (LLAMA, ("<|python_tag|>",)),
    "mistral": (MISTRAL, ("[TOOL_CALLS]",)),
}


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def written(kind: str, *calls: tuple[str, str]) -> str:
    key = "parameters" if kind == "llama" else "arguments"
    objects = [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in calls]
    if kind == "llama":
        return "<|python_tag|>" + "; ".join(objects)
    if kind == "mistral":
        return f"[TOOL_CALLS][{', '.join(objects)}]"
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)


def check_fits(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        validator_for(SCHEMAS[name]).validate(json.loads(arguments))


# Each kind of model, and the server that has it.
Models = dict[str, tuple[Speaking, Live]]
