"""A model that says what it is told to, and otherwise what a hash of the text says, with the tokenizer of bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import runtime.generator
from runtime import Generator
from runtime.bundle.engine_file import EngineFile
from runtime.engines.protocol import Engine
from tests.runtime.known_engine import KnownEngine, Text

ENGINE = Path(__file__).resolve().parents[2] / "fixtures" / "engine-0.1.0"
ASSISTANT, STOP, SIZE = 4, 2, 264

# Small templates, each of a kind that models have.
PLAIN = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QWEN = """
{%- if tools %}<|user|>Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %} Answer <tool_call>{% endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}<|user|><tool_response>{{ message.content }}</tool_response></s>
    {%- elif message.tool_calls %}<|assistant|>{{ message.content }}
        {%- for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}</s>
    {%- else %}<|{{ message.role }}|>{{ message.content }}</s>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
LLAMA = """
{%- if tools is not none %}<|user|>{% for tool in tools %}{{ tool | tojson(indent=1) }}{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if "tool_calls" in message %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}<|assistant|><|python_tag|>{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}</s>
    {%- elif message.role in ["tool", "ipython"] %}<|user|>{{ message.content | tojson }}</s>
    {%- else %}<|{{ message.role }}|>{{ message.content }}</s>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""  # noqa: E501
MISTRAL = """
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if loop.last and tools is not none %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ message.content }}[/INST]
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}[TOOL_CALLS][
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{ raise_exception("ids have nine characters") }}{% endif %}
            {{- {"name": call.function.name, "arguments": call.function.arguments, "id": call.id} | tojson }}{{ ", " if not loop.last }}
        {%- endfor %}]</s>
    {%- elif message.role == "tool" %}[TOOL_RESULTS]{{ {"content": message.content, "call_id": message.tool_call_id} | tojson }}[/TOOL_RESULTS]
    {%- elif message.role == "system" %}{{ raise_exception("no system message") }}
    {%- else %}{{ message.content + "</s>" }}{% endif %}
{%- endfor %}<|assistant|>"""  # noqa: E501


class Speaker(KnownEngine):
    """Says `says` after the last `<|assistant|>`, as far as it is let."""

    def __init__(self, about: EngineFile) -> None:
        super().__init__(about.dims, self._logits, lambda text, step: self._logits((*text, step)), 8)
        self.says: Sequence[int] = ()

    def _logits(self, text: Text) -> NDArray[np.float32]:
        place = len(text) - text[::-1].index(ASSISTANT) if ASSISTANT in text else 0
        answer = text[place:]
        seed = hashlib.sha256(bytes(token % 256 for token in answer[-3:])).digest()
        logits = np.random.default_rng(list(seed)).normal(0, 1, SIZE).astype(np.float32)
        if list(answer) == list(self.says[: len(answer)]) and self.says:
            logits[self.says[len(answer)] if len(answer) < len(self.says) else STOP] = 50
        return logits


class Speaking:
    """A `generator` that is told what to say; `special` tokens are added to its tokenizer."""

    def __init__(
        self, folder: Path, template: str = PLAIN, special: Sequence[str] = (), context: int = 4096, **options: Any
    ) -> None:
        shutil.copytree(ENGINE, folder, dirs_exist_ok=True)
        tokenizer = json.loads((folder / "engine.tokenizer.json").read_text())
        assert len(special) <= SIZE - 261
        for number, text in enumerate(special, start=261):
            token = {"id": number, "content": text, "special": True}
            token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            tokenizer["added_tokens"].append(token)
        about = json.loads((folder / "engine.json").read_text())
        about["max_context"] = context
        for name, content in (("tokenizer", json.dumps(tokenizer)), ("chat_template", template)):
            path = folder / about[name]["name"]
            path.write_text(content)
            held = path.read_bytes()
            about[name] |= {"bytes": len(held), "sha256": hashlib.sha256(held).hexdigest()}
        (folder / "engine.json").write_text(json.dumps(about))
        made: list[Speaker] = []

        def opened(_files: object, about: EngineFile, *rest: Any) -> Engine:
            made.append(Speaker(about))
            return made[0]

        original = runtime.generator.open_engine  # type: ignore[attr-defined]
        runtime.generator.open_engine = opened  # type: ignore[assignment, attr-defined]
        try:
            self.generator = Generator(folder / "engine.onnx", threads=1, adapt=False, **options)
        finally:
            runtime.generator.open_engine = original  # type: ignore[attr-defined]
        self.speaker = made[0]

    def say(self, text: str) -> None:
        """Have it say `text` next; nothing for what comes to its mind."""
        self.speaker.says = self.generator.encode(text, raw=True) if text else ()
