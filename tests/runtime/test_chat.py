import pytest

from runtime.chat import ChatTemplate
from runtime.errors import EngineFileError, InputError
from tests.conftest import CHAT_TEMPLATE, byte_tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be <b>brief</b> & kind"}, {"role": "user", "content": "é\n\n 'x' \"y\""}],
]
WITH_HELPERS = """
{%- for message in messages %}
    {%- if loop.index > 5 %}{% break %}{% endif %}
    {{ message | tojson }}
{% endfor %}{{ eos_token }}"""


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITH_HELPERS])
def test_templates_render_as_in_transformers(template: str, messages: list) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    assert ChatTemplate(template, special).render(messages) == expected


def test_what_a_template_refuses_is_the_users_error() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InputError, match="roles must alternate"):
        template.render(CONVERSATIONS[0])


def test_a_template_cannot_reach_into_python() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(InputError, match="refuses this conversation"):
        template.render(CONVERSATIONS[0])


def test_a_damaged_template() -> None:
    with pytest.raises(EngineFileError, match="chat template is not valid"):
        ChatTemplate("{% if %}", {})
