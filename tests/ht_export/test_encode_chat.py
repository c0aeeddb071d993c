"""Conversations encoded for export and training, as `transformers` encodes them, whatever the checkpoint's template."""

import gc

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ht_export.prompts import _templates, encode_chat
from runtime.errors import InputError
from tests.conftest import byte_tokenizer
from tests.runtime.tokenizers import KINDS, tokenizer_of

# The manners of the templates of Llama 3, Mistral, Gemma, Phi-3 and Qwen.
TEMPLATES = {
    "llama 3": (
        "{{- bos_token }}\n{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}{%- set messages = messages[1:] %}{%- endif %}\n"
        "{%- if tools is not none %}{{- 'tools' }}{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<|im_start|>' + role + '\\n' + (message['content'] | trim) + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
    ),
    "phi 3": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
        "{% endfor %}<|assistant|>\n"
    ),
    "qwen 3": (
        "{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n"
        "    {%- if ns.multi_step and message.role == 'user' and message.content is string %}\n"
        "        {%- set ns.multi_step = false %}{%- set ns.last = messages|length - loop.index %}\n    {%- endif %}\n"
        "{%- endfor %}\n{%- for message in messages %}\n    {%- if '</think>' in message.content %}\n"
        "        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}\n"
        "    {%- else %}{%- set content = message.content %}{%- endif %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}\n{%- endfor %}\n"
        "{{- '<|im_start|>assistant\\n' }}"
    ),
}
TURNS = (["Hi there", "  And now?\n"], ["<think>hm</think>\n Hello </s>"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(kind: str, name: str) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(kind), chat_template=TEMPLATES[name], bos_token="<s>", eos_token="</s>"
    )
    (first, second), (answer,) = TURNS
    messages = [{"role": "user", "content": first}]
    for turns, answers in ([first], []), ([first, second], [answer]):
        if answers:
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": second}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert encode_chat(tokenizer, turns, answers) == expected


def test_a_changed_template_is_rendered_and_none_outlives_its_tokenizer() -> None:
    before = len(_templates)
    tokenizer = byte_tokenizer()
    first = encode_chat(tokenizer, ["Hi"])
    tokenizer.chat_template = "<|user|>{{ messages[0].content }}"
    assert encode_chat(tokenizer, ["Hi"]) == tokenizer("<|user|>Hi").input_ids != first
    assert len(_templates) == before + 1
    del tokenizer
    gc.collect()
    assert len(_templates) == before


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "^the model's chat template is not valid: line 1: Expected an expression"),
        ("\n{{ raise_exception('no') }}", "^a conversation of 2 turns: the chat template, line 2, refuses .*: no$"),
        (
            "{{ 'a'.center(10**10) }}",
            "^a conversation of 2 turns: the chat template, line 1, cannot .* 512 MiB of memory",
        ),
        ("{{ messages[0].nothing.at.all }}", "^a conversation of 2 turns: the chat template, line 1, refuses"),
    ],
)
def test_a_hostile_template_is_one_error(template: str, message: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_of("byte level").to_str()))
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message):
        encode_chat(tokenizer, ["a", "b"], ["c"])


@pytest.mark.parametrize("template", ["\n", "{% if false %}a{% endif %}"])
def test_a_conversation_without_a_token_is_refused(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="a conversation of 2 turns has no token for this model; give other prompts"):
        encode_chat(tokenizer, ["a", "b"], ["c"])
