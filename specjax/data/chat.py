"""Chat templates: the messages of a conversation as the text that a model was trained on."""

import datetime
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser

from specjax.models import hf_config

_FILE, _CONFIG, _TOKENS = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
_SPECIAL = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class Template(NamedTuple):
    """A chat template and the special tokens that it may name."""

    path: Path  # the file that states it
    compiled: jinja2.Template
    tokens: dict[str, str]  # such as bos_token and eos_token

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as text, special tokens included.

        Keys of a message whose value is None are left out, as transformers 5 does.

        Args:
          messages: see `check_messages`.
          add_generation_prompt: whether the text ends where the assistant's answer begins.
          variables: whatever else the template reads, such as `tools`; they go before the
              special tokens.

        Raises:
          ValueError: as `check_messages`; a template that refuses the messages or fails.
        """
        check_messages(messages)
        given = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            return self.compiled.render(
                {"tools": None, "documents": None, **self.tokens, **variables},
                messages=given,
                add_generation_prompt=add_generation_prompt,
            )
        except _Refusal as refusal:
            raise ValueError(
                f"{self.path} refuses these {len(given)} message(s): {_line(refusal)}"
            ) from refusal
        except Exception as error:  # a template is a program and may fail in any way
            raise ValueError(
                f"{self.path} fails on these {len(given)} message(s) ({type(error).__name__}: "
                f"{_line(error)}); need messages that it has a form for."
            ) from error


def load(directory: str | Path) -> Template | None:
    """The chat template of a directory; None if it has none.

    chat_template.jinja goes before the `chat_template` of tokenizer_config.json, of which the one
    named "default" is taken if there are several.

    Raises:
      ValueError: a file that is damaged, or a template that does not parse.
    """
    directory = Path(directory)
    config = _read_object(directory / _CONFIG)
    path, source = directory / _FILE, None
    if path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except ValueError as error:
            raise ValueError(f"{path} is not text ({error}); need UTF-8.") from error
    elif config.get("chat_template") is not None:
        path = directory / _CONFIG
        source = _default(config["chat_template"], path)
    if source is None:
        return None
    try:
        compiled = _environment().from_string(source)
    except Exception as error:  # not only jinja2's: a break outside of a loop is a SyntaxError
        raise ValueError(
            f"The chat template of {path} does not parse ({_line(error)}); need one in Jinja."
        ) from error
    return Template(path, compiled, _special_tokens(directory, config))


def check_messages(messages: Any) -> None:
    """Whether these are a conversation: objects with a role and a content.

    The content is text or a list of objects; a message with tool_calls needs none.

    Raises:
      ValueError: they are not.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(
            f"The messages are {_shown(messages)}; need a list of one or more objects with "
            "role and content."
        )
    for i, message in enumerate(messages):
        which = f"Message {i + 1} of {len(messages)}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{which} is {_shown(message)}; need an object with role and content.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise ValueError(f"{which} has role {_shown(role)}; need a string such as 'user'.")
        parts = isinstance(content, (list, tuple)) and all(isinstance(x, Mapping) for x in content)
        called = content is None and message.get("tool_calls")
        if not (isinstance(content, str) or parts or called):
            raise ValueError(
                f"{which}, of role {_shown(role)}, has content {_shown(content)}; need a string "
                "or a list of objects."
            )


# ----------------------------------------------------------------------------- files


def _read_object(path: Path) -> dict[str, Any]:
    return hf_config.read_json(path) if path.is_file() else {}


def _default(stated: Any, path: Path) -> str:
    """The template, or of several the default one."""
    if isinstance(stated, list):
        named = {x.get("name"): x.get("template") for x in stated if isinstance(x, dict)}
        if "default" not in named:
            raise ValueError(
                f"{path} has chat templates {_shown(list(named))}; need one named 'default'."
            )
        stated = named["default"]
    if not isinstance(stated, str):
        raise ValueError(
            f"{path} gives chat_template as {_shown(stated)}; need a string, or a list of objects "
            "with name and template."
        )
    return stated


def _special_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Every named special token, by the name under which templates know it."""
    # Where the first file lists the added tokens, the second is a leftover of older versions.
    old = {} if "added_tokens_decoder" in config else _read_object(directory / _TOKENS)
    tokens = {}
    for name, value in (config | old).items():
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and name.endswith("_token"):
            tokens[name] = content
        elif name in _SPECIAL and value is not None:
            raise ValueError(
                f"{directory} gives {name} as {_shown(value)}; need a string or an object with "
                "content."
            )
    return tokens


# ----------------------------------------------------------------------------- Jinja


class _Refusal(jinja2.TemplateError):
    """The template's own words."""


class _Generation(ext.Extension):
    """{% generation %} marks what the assistant said, which matters to training only."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    """What transformers gives to templates; sandboxed, since anybody may have written them."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape what is special in HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: Any) -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _line(error: Exception) -> str:
    where = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return where + " ".join(str(error).split())


def _shown(value: Any) -> str:
    """On one line and short, whatever it is."""
    return " ".join(reprlib.repr(value).split())
