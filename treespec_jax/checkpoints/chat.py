"""Chat templates: a conversation as the text that a model was trained on.

A template is a Jinja program that came with somebody's checkpoint. It runs in Jinja's
sandbox, sees copies of plain data only, and has the environment that `transformers`
gives it, as templates are written for that.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.files import first_line, parse_json
from treespec_jax.checks import check_text
from treespec_jax.errors import UserError

Message = Mapping[str, Any]

_JINJA, _PROCESSOR = "chat_template.jinja", "chat_template.json"
_CONFIG = "tokenizer_config.json"
# Types of parts of a content, of OpenAI's two interfaces.
_TEXTS = ("text", "input_text", "output_text")
TEMPLATE_FILES = (_JINJA, _PROCESSOR)


@dataclasses.dataclass(frozen=True)
class TemplateSource:
    """The chat template of a checkpoint, not compiled yet.

    Attributes:
      programs: Jinja programs by name; conversations use the one named "default".
      source: what messages call it, the path of a file for example.
    """

    programs: Mapping[str, str]
    source: str


class ChatTemplate:
    """A compiled template.

    Args:
      template: the programs of a checkpoint.
      tokens: spellings of special tokens by role, "bos_token" for example; the
        template sees them under these names.

    Raises:
      UserError: no program is named "default", or it is malformed.
    """

    def __init__(self, template: TemplateSource, tokens: Mapping[str, str]):
        from jinja2 import TemplateSyntaxError

        self._source = template.source
        self._tokens = dict(tokens)
        try:
            self._program = _environment().from_string(_default(template))
        except TemplateSyntaxError as error:
            raise UserError(
                f"{self._source}: the chat template is malformed in line "
                f"{error.lineno}: {first_line(error)}"
            ) from None
        except Exception as error:
            # What Jinja takes for a template need not be one of Python: a break outside
            # a loop, brackets without end, a number of thousands of digits.
            raise UserError(
                f"{self._source}: the chat template cannot be compiled: "
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
          messages: in order, see `check_messages`.
          variables: more for the template to see, `enable_thinking` for example;
            `add_generation_prompt` is true unless given.

        Raises:
          UserError: malformed messages, or the template refuses them, with its words.
        """
        if not isinstance(variables, Mapping | None):
            raise UserError(
                "variables must map names to what the template sees, got "
                f"{variables!r:.60}"
            )
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
        except Exception as error:
            # A program raises anything for messages that it was not written for.
            raise UserError(
                f"{self._source}: the chat template fails: {first_line(error)}"
            ) from None


def find_template(files: Mapping[str, bytes], folder: Path) -> TemplateSource | None:
    """The chat template among the files of a tokenizer, or None.

    `chat_template.jinja`, else `chat_template` in `tokenizer_config.json` or
    `chat_template.json`: one program, or a list of named ones.

    Args:
      files: contents by name.
      folder: the folder that holds them.

    Raises:
      UserError: a file is damaged.
    """
    if _JINJA in files:
        try:
            text = files[_JINJA].decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"{folder / _JINJA} is not UTF-8 text; download it again"
            ) from None
        return TemplateSource({"default": text}, str(folder / _JINJA))
    for name in (_CONFIG, _PROCESSOR):
        if name in files:
            found = parse_json(files[name], folder / name).get("chat_template")
            if found:
                return TemplateSource(_programs(found), str(folder / name))
    return None


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of the messages of one conversation, made of plain data.

    Args:
      messages: each with a "role" and a "content": a text, or a list of texts and
        {"type": "text", "text": …}, which are joined by line breaks. A key that is null
        is as good as missing: programs write {"content": null, "tool_calls": …}, and a
        template would write the word None.

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
    return [_checked(index, message) for index, message in enumerate(messages)]


def _checked(index: int, message: Any) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise UserError(
            f'{where} must be {{"role": …, "content": …}}, got {message!r:.60}'
        )
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise UserError(f'{where} needs a "role", user for example')
    where += f" ({' '.join(role.split()):.20})"
    if "content" in given:
        given["content"] = _joined(given["content"], where)
    elif not set(given) - {"role", "name"}:
        # A call of a tool, for example, may stand for the text.
        raise UserError(f'{where} needs a "content" that is a text, got None')
    return _plain(given, where)


def _joined(content: Any, where: str) -> str:
    """A text, or the parts of one as other programs give them."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if _is_list(content) else [content]:
        text = part
        if isinstance(part, Mapping):
            kind = part.get("type", "text")
            if kind not in _TEXTS:
                raise UserError(
                    f"{where} has a part of type {kind!r:.40}; only text can be read, "
                    "leave it out"
                )
            text = part.get("text")
        if not isinstance(text, str):
            raise UserError(
                f'{where} needs a "content" that is a text, got {content!r:.60}'
            )
        texts.append(text)
    return "\n".join(texts)


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
        text = json.dumps(values, ensure_ascii=False)
        check_text(what, text)
        return json.loads(text)
    except UserError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} must be plain data: {first_line(error)}") from None


def _programs(found: Any) -> dict[str, str]:
    """Programs by name, of one program or a list of named ones; {} if malformed."""
    if isinstance(found, str):
        return {"default": found}
    try:
        return {each["name"]: each["template"] for each in found}
    except (TypeError, KeyError):
        return {}


def _default(template: TemplateSource) -> str:
    program = template.programs.get("default")
    if not isinstance(program, str):
        names = ", ".join(map(repr, template.programs)) or "none"
        raise UserError(
            f"{template.source}: no chat template is named 'default' (there is: "
            f"{names}); put the one to use into {_JINJA} beside it"
        )
    return program


class _Refused(Exception):
    """A template called `raise_exception`."""


def _refuse(message: str) -> None:
    raise _Refused(" ".join(str(message).split()))


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without the escapes for web pages that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


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
    environment.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
    return environment
