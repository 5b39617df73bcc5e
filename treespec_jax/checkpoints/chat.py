"""Chat templates: a conversation as the text that a model was trained on.

A template is a Jinja program that came with somebody's checkpoint. It runs in Jinja's
sandbox, sees copies of plain data only, and has the environment that `transformers`
gives it, as templates are written for that.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.files import first_line, read_json
from treespec_jax.errors import UserError

Message = Mapping[str, Any]

_JINJA, _CONFIG, _PROCESSOR = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "chat_template.json",
)
TEMPLATE_FILES = (_JINJA, _PROCESSOR)


class ChatTemplate:
    """One template.

    Args:
      source: the Jinja program.
      path: the file that it is from.
      tokens: spellings of special tokens by role, "bos_token" for example; the
        template sees them under these names.

    Raises:
      UserError: the program is malformed.
    """

    def __init__(self, source: str, path: Path, tokens: Mapping[str, str]):
        from jinja2 import TemplateSyntaxError

        self.path = path
        self._tokens = dict(tokens)
        try:
            self._program = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise UserError(
                f"{path}: the chat template is malformed in line {error.lineno}: "
                f"{first_line(error)}"
            ) from None

    def render(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> str:
        """The text of a conversation, up to where the answer begins.

        What looks like a special token in a message becomes one when the text is
        encoded, as with `transformers`: a service that must not let its users write
        control tokens has to take them out of the messages.

        Args:
          messages: in order, each with a "role" and a "content" text.
          variables: more for the template to see, `enable_thinking` for example;
            `add_generation_prompt` is true unless given.

        Raises:
          UserError: malformed messages, or the template refuses them, with its words.
        """
        from jinja2 import TemplateError

        values = {
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            **self._tokens,
            **_plain(dict(variables or {}), "the template's variables"),
            "messages": check_messages(messages),
        }
        try:
            return self._program.render(values)
        except _Refused as error:
            raise UserError(f"the chat template refuses: {error}") from None
        # Anything may come out of a program, of messages it was not written for.
        except (TemplateError, ArithmeticError, LookupError) as error:
            reason = first_line(error)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = first_line(error)
        raise UserError(f"{self.path}: the chat template fails: {reason}") from None


def find_template(tokenizer: Path, tokens: Mapping[str, str]) -> ChatTemplate:
    """The template that belongs to a tokenizer.

    `chat_template.jinja` beside it, else `chat_template` in `tokenizer_config.json` or
    `chat_template.json`: a program, or several by name of which "default" is taken.

    Args:
      tokenizer: its file.
      tokens: see `ChatTemplate`.

    Raises:
      UserError: there is none, or it is malformed.
    """
    folder = tokenizer.parent
    path = folder / _JINJA
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), path, tokens)
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text; download it again") from None
    for path in (folder / _CONFIG, folder / _PROCESSOR):
        found = read_json(path).get("chat_template") if path.is_file() else None
        if found:
            return ChatTemplate(_default(found, path), path, tokens)
    raise UserError(
        f"no chat template beside {tokenizer}: neither {_JINJA} nor a chat_template in "
        f"{_CONFIG}; take a model that was trained for chat, or generate without it"
    )


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of the messages of one conversation, made of plain data.

    Raises:
      UserError: names the message that has no role or no text.
    """
    if not _is_list(messages):
        raise UserError(
            'messages must be a list of {"role": …, "content": …}, got '
            f"{messages!r:.60}"
        )
    if not messages:
        raise UserError("the conversation is empty; give at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(
                f'message {index} must be {{"role": …, "content": …}}, got '
                f"{message!r:.60}"
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise UserError(f'message {index} needs a "role", user for example')
        # A call of a tool may stand for the text.
        spoken = isinstance(content, str) or (content is None and len(message) > 2)
        if not spoken:
            raise UserError(
                f'message {index} ({role}) needs a "content" that is a text, got '
                f"{content!r:.60}"
            )
    return _plain([dict(message) for message in messages], "the messages")


def check_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """One conversation or several, as several.

    Raises:
      UserError: malformed; see `check_messages`.
    """
    many = _is_list(messages) and messages and all(map(_is_list, messages))
    return [check_messages(each) for each in (messages if many else [messages])]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _plain(values: Any, what: str) -> Any:
    """A copy by way of JSON: a template gets no object that it could call."""
    try:
        return json.loads(json.dumps(values))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} must be plain data: {first_line(error)}") from None


def _default(found: Any, path: Path) -> str:
    if isinstance(found, str):
        return found
    try:
        named = {each["name"]: each["template"] for each in found}
    except (TypeError, KeyError):
        named = {}
    if not isinstance(named.get("default"), str):
        names = ", ".join(map(repr, named)) or "none"
        raise UserError(
            f"{path}: no chat template is named 'default' (there is: {names}); put "
            f"the one to use into {_JINJA} beside it"
        )
    return named["default"]


class _Refused(Exception):
    """A template called `raise_exception`."""


def _refuse(message: str) -> None:
    raise _Refused(" ".join(str(message).split()))


def _to_json(
    value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False
) -> str:
    """Without the escapes for web pages that Jinja's own filter makes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.cache
def _environment():
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks for training what the model wrote."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
        form
    )
    return environment
