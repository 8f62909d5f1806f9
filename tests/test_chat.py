"""Chat templates: the same text as transformers, and every refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf_tokenizers
from refusals import refused

from specjax.data import chat, tokenizers

# Each in the manner of a family, with what makes that family's template hard to run.
HEADERS = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = 'Be brief.' %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|header|>system<|end_header|>\\n\\n' + system + '<|eot|>' }}
{%- for message in rest %}
    {{- '<|header|>' + message['role'] + '<|end_header|>\\n\\n' }}
    {{- message.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|end_header|>\\n\\n' }}
{%- endif %}
"""
CHATML = """\
{% for message in messages %}
{% if loop.first and message.role != 'system' %}
<|im_start|>system
You help.<|im_end|>
{% endif %}
{{ '<|im_start|>' + message.role }}
{% generation %}
{% set body = message.content %}
{{ body }}{{ eos_token }}
{% endgeneration %}
{{ body }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
TURNS = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('No system turns') }}{% endif %}
{%- for message in messages -%}
{%- set role = {'assistant': 'model'}.get(message['role'], message['role']) -%}
{{ '<turn>' + role + '\\n' + message['content'] | trim + '</turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<turn>model\\n' }}{%- endif -%}
"""
ALTERNATING = """\
{%- set first = namespace(done=false) -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate:\\nuser, assistant, user') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- ('' if first.done else bos_token) + '[INST] ' + message['content'] + ' [/INST]' -}}
        {%- set first.done = true -%}
    {%- else -%}
        {{- ' ' + message['content'] + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
LOOPS = """\
{% for message in messages | reverse %}
    {% if message.content == 'skip' %}{% continue %}{% endif %}
{{ loop.index }}: {{ message.content }}
    {% if message.role == 'user' %}{% break %}{% endif %}
{% endfor %}
{{ 'thinks' if thinking is defined and thinking else 'does not think' }}{{ pad_token }}
"""
DATED = "{{ strftime_now('%d %b %Y') }}: {{ messages[-1].content }}{{ unk_token is defined }}"
JSON = """\
{%- if tools is none and documents is none %}
{{ 'no tools' }}
{%- else %}
{{ tools | tojson(indent=4) }}
{%- endif %}
 {{ messages | tojson }}
 {{ {'b': '<é>', 'a': [1, none]} | tojson(sort_keys=true, separators=(',', ':')) }}
{{ messages[0].content | tojson(ensure_ascii=true) }}
"""
TEMPLATES = {
    "headers": HEADERS,
    "chatml": CHATML,
    "turns": TURNS,
    "alternating": ALTERNATING,
    "loops": LOOPS,
    "dated": DATED,
    "json": JSON,
}
USER = {"role": "user", "content": ' Où est <l\'été> & "漢" 🙂?\n'}
ASSISTANT = {"role": "assistant", "content": "Là.\n\n\\ skip"}
SYSTEM = {"role": "system", "content": "\tFrench only.  "}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "three": [USER, ASSISTANT, {"role": "user", "content": "skip"}],
    "system": [SYSTEM, USER, ASSISTANT],
    "null": [USER | {"name": None, "tool_calls": None, "extra": [1, {"a": "é"}]}],
}
TOOLS = [{"type": "function", "function": {"name": "où", "parameters": {}}}]


def write(directory: Path, template: Any = None, **config: Any) -> Path:
    raw = config if template is None else {"chat_template": template, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(raw))
    return directory


def load(directory: Path) -> chat.Template:
    template = chat.load(directory)
    assert template is not None
    return template


def render(directory: Path, template: str, messages: Any, **variables: Any) -> str:
    return load(write(directory, template, bos_token="<s>")).render(messages, **variables)


# ----------------------------------------------------------------------------- what is rendered


@pytest.mark.parametrize("jinja_file", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_as_transformers(name: str, jinja_file: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.train_bpe([], 257),
        bos_token="<s>",
        eos_token=hf_tokenizers.AddedToken("</s>", lstrip=True),
        pad_token="<pad>",
        chat_template=TEMPLATES[name],
    )
    theirs.save_pretrained(tmp_path, save_jinja_files=jinja_file)
    assert (tmp_path / "chat_template.jinja").is_file() == jinja_file
    ours = load(tmp_path)
    num_refused = 0
    for messages in CONVERSATIONS.values():
        for variables in ({}, {"thinking": True, "bos_token": "<begin>"}, {"tools": TOOLS}):
            for prompt in (True, False):
                found: list[str] = []
                try:
                    found.append(ours.render(messages, prompt, **variables))
                except ValueError:
                    num_refused += 1
                    with pytest.raises(Exception, match=r"must alternate|No system"):
                        theirs.apply_chat_template(
                            messages, tokenize=False, add_generation_prompt=prompt, **variables
                        )
                    continue
                needed = theirs.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, **variables
                )
                found.append(ours.render(messages, prompt, **variables))  # midnight may pass
                assert needed in found
    assert num_refused == (6 if name in ("turns", "alternating") else 0)


def test_renders_as_written(tmp_path: Path) -> None:
    assert render(tmp_path, HEADERS, [{"role": "user", "content": " hi "}]) == (
        "<s><|header|>system<|end_header|>\n\nBe brief.<|eot|>"
        "<|header|>user<|end_header|>\n\nhi<|eot|><|header|>assistant<|end_header|>\n\n"
    )
    text = render(tmp_path, JSON, [{"role": "user", "content": "<é>"}])
    assert text.splitlines() == [
        'no tools [{"role": "user", "content": "<é>"}]',
        ' {"a":[1,null],"b":"<é>"}',
        '"<\\u00e9>"',
    ]
    pieces = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    parts = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
    assert render(tmp_path, parts, [{"role": "user", "content": pieces}]) == "ab"


def test_messages_are_left_alone(tmp_path: Path) -> None:
    message = {"role": "user", "content": "a", "name": None}
    assert render(tmp_path, "{{ messages[0] | tojson }}", (message,)) == (
        '{"role": "user", "content": "a"}'
    )
    assert "name" in message
    failing = "{% set _ = messages.append(1) %}"
    refused(lambda: render(tmp_path, failing, [message]), "fails on these 1 .*SecurityError")


# ----------------------------------------------------------------------------- files


def test_directory_without_a_template(tmp_path: Path) -> None:
    assert chat.load(tmp_path) is None
    assert chat.load(str(write(tmp_path, bos_token="<s>"))) is None
    assert chat.load(write(tmp_path, chat_template=None)) is None
    assert chat.load(tmp_path / "nowhere") is None


def test_which_template(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert load(write(tmp_path, several)).render([USER]) == "d"
    assert load(tmp_path).path == tmp_path / "tokenizer_config.json"
    (tmp_path / "chat_template.jinja").write_text("é\n{{ bos_token }}", encoding="utf-8")
    write(tmp_path, several, bos_token="<s>")
    assert load(tmp_path).render([USER]) == "é\n<s>"
    (tmp_path / "tokenizer_config.json").unlink()
    assert load(tmp_path).render([USER]) == "é\n"


def test_special_tokens(tmp_path: Path) -> None:
    token = {"__type": "AddedToken", "content": "</s>", "lstrip": False}
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<old>", "eos_token": token, "additional_special_tokens": ["x"]})
    )
    config = {
        "bos_token": "<s>",
        "pad_token": None,
        "image_token": "<image>",
        "add_bos_token": True,
    }
    template = load(write(tmp_path, "", **config))
    assert template.tokens == {"bos_token": "<old>", "image_token": "<image>", "eos_token": "</s>"}
    template = load(write(tmp_path, "", added_tokens_decoder={}, **config))
    assert template.tokens == {"bos_token": "<s>", "image_token": "<image>"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"chat_template": 5}, "gives chat_template as 5; need a string, or a list"),
        ({"chat_template": {"default": "a"}}, "gives chat_template as .*; need a string, or a"),
        ({"chat_template": []}, r"has chat templates \[\]; need one named 'default'"),
        ({"chat_template": [{"name": "rag", "template": "a"}, 1]}, r"templates \['rag'\]; need"),
        ({"chat_template": [{"name": "default"}]}, "gives chat_template as None; need a string"),
        ({"chat_template": "a", "bos_token": 1}, "gives bos_token as 1; need a string or an"),
        ({"chat_template": "a", "eos_token": {"a": 1}}, "gives eos_token as {'a': 1}; need a"),
        ({"chat_template": "{% for %}\n\n"}, "does not parse .line 1: Expected an expression"),
        (
            {"chat_template": "\n{{ a | shout }}"},
            "does not parse .line 2: No filter named 'shout'",
        ),
        ({"chat_template": "{% break %}"}, "does not parse .*break.*; need one in Jinja"),
        ({"chat_template": "{% generation %}a"}, "does not parse .*end"),
    ],
)
def test_refuses_templates(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    refused(lambda: chat.load(write(tmp_path, **config)), words)
    refused(lambda: chat.load(tmp_path), str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "{\n\n"])
def test_refuses_damaged_json(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("a")
    (tmp_path / name).write_text(text)
    refused(lambda: chat.load(tmp_path), f"{name} .*; need a JSON object")


def test_refuses_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    refused(lambda: chat.load(tmp_path), "chat_template.jinja is not text .*; need UTF-8")


# ----------------------------------------------------------------------------- messages


def test_a_template_refuses_in_its_own_words(tmp_path: Path) -> None:
    refused(
        lambda: render(tmp_path, ALTERNATING, [USER, USER]),
        "tokenizer_config.json refuses these 2 .*: Roles must alternate: user, assistant, user$",
    )
    refused(lambda: render(tmp_path, TURNS, [SYSTEM]), "refuses these 1 .*: No system turns$")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ a.b.c }}", "UndefinedError: 'a' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(10000000) %}{% endfor %}", "OverflowError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_fails(template: str, words: str, tmp_path: Path) -> None:
    refused(lambda: render(tmp_path, template, [USER]), f"fails on these 1 .*{words}.*; need")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "The messages are 'hello'; need a list of one or more objects with role and"),
        (USER, "The messages are {.*; need a list"),
        ([], r"The messages are \[\]; need a list"),
        (None, "The messages are None; need a list"),
        ([USER, "a\nb"], r"Message 2 of 2 is 'a\\nb'; need an object with role and content"),
        ([{"content": "a"}], "Message 1 of 1 has role None; need a string such as 'user'"),
        ([USER, {"role": 3, "content": "a"}], "Message 2 of 2 has role 3; need a string"),
        ([{"role": "user"}], "Message 1 of 1, of role 'user', has content None; need a string"),
        (
            [USER | {"content": 5}],
            "Message 1 of 1, .* has content 5; need a string or a list of objects",
        ),
        (
            [USER | {"content": ["a"]}],
            r".* has content \['a'\]; need a string or a list of objects",
        ),
    ],
)
def test_refuses_messages(messages: Any, words: str, tmp_path: Path) -> None:
    refused(lambda: chat.check_messages(messages), f"^{words}")
    refused(lambda: render(tmp_path, "a", messages), f"^{words}")


def test_a_call_of_tools_needs_no_content(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    text = render(tmp_path, "{{ messages[1].content is defined }}", [USER, call])
    assert text == "False"
