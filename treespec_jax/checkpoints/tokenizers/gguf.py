"""Tokenizers from the metadata of GGUF files.

Two kinds of vocabulary: "gpt2", byte pairs whose merges are listed, which become a
`tokenizer.json`; and "llama", pieces with scores, which become the sentencepiece model
that they were taken from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from treespec_jax.checkpoints.chat import TemplateSource
from treespec_jax.checkpoints.tokenizers.base import SPACE, Tokenizer
from treespec_jax.checkpoints.tokenizers.pretokenizers import DEFAULT, PRE_TOKENIZERS
from treespec_jax.checkpoints.tokenizers.sentencepiece import (
    SentencePieceTokenizer,
    serialise_model,
)
from treespec_jax.checkpoints.tokenizers.settings import AddedToken, TokenizerSettings
from treespec_jax.checkpoints.tokenizers.tokenizer_json import HuggingFaceTokenizer
from treespec_jax.errors import UserError

# Types of tokens, of GGUF and of sentencepiece alike.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# Fields of sentencepiece's `TrainerSpec` and `NormalizerSpec`, and a value.
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK, _UNK_ID, _UNK_PIECE = 3, 4, 35, 40, 45
_NAME, _ADD_PREFIX, _STRIP_SPACES = 1, 3, 4
_BPE = 2
# By role: the key of the token's id, and its default in a "llama" vocabulary.
_ROLES = {
    "bos_token": ("bos_token_id", 1),
    "eos_token": ("eos_token_id", 2),
    "unk_token": ("unknown_token_id", 0),
    "pad_token": ("padding_token_id", None),
    "sep_token": ("seperator_token_id", None),
    "mask_token": ("mask_token_id", None),
}
# Control tokens that end an answer, in files that do not say which one does.
_TURN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|end|>",
    "<EOT>",
    "<end_of_utterance>",
)


def make_tokenizer(metadata: Mapping[str, Any], source: str) -> Tokenizer | None:
    """The tokenizer that a GGUF file holds; None if it holds none.

    Args:
      metadata: of the file.
      source: its path, for messages.

    Raises:
      UserError: a vocabulary or a pre-tokeniser of a kind that is not supported, a key
        missing, or data that do not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    vocabulary = _Vocabulary(metadata, source)
    if kind not in _KINDS:
        vocabulary.refuse("model", kind, " or ".join(_KINDS))
    convert, tokenizer = _KINDS[kind]
    data, settings = convert(vocabulary)
    try:
        return tokenizer(data, settings)
    except UserError:
        # Its message names the kind of file that the data were made for.
        raise UserError(
            f"{source}: tokens, types and merges of its tokenizer do not fit together; "
            "download it again, or name another tokenizer with --tokenizer"
        ) from None


def read_notes(metadata: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """What is to know of the tokenizer, a line each."""
    byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    if byte_level and metadata.get("tokenizer.ggml.pre") is None:
        return (
            f"{source} lacks tokenizer.ggml.pre: texts are cut into words as llama.cpp "
            "does by default, which may not be how the model was trained",
        )
    return ()


class _Vocabulary:
    """The tokens of a file, and the settings beside them.

    Attributes:
      source: path of the file.
      tokens: the spellings.
      types: of the tokens, one of the constants above each.
    """

    def __init__(self, metadata: Mapping[str, Any], source: str):
        self._values = metadata
        self.source = source
        tokens = self.array("tokens", str)
        # llama.cpp gives a name to tokens without one.
        self.tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        if len(set(self.tokens)) < len(tokens):
            seen: set[str] = set()
            twice = next(t for t in self.tokens if t in seen or seen.add(t))
            raise UserError(f"{source}: token {twice!r} is there twice; convert again")
        self.types = [_NORMAL] * len(tokens)
        if self.get("token_type") is not None:
            self.types = self.array("token_type", int, len(tokens))

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(f"tokenizer.ggml.{name}")
        return default if value is None else value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return value

    def array(self, name: str, kind: type, size: int | None = None) -> list[Any]:
        value = self.get(name)
        if value is None:
            raise UserError(
                f"{self.source} lacks tokenizer.ggml.{name}; download it again, or "
                "name a tokenizer with --tokenizer"
            )
        kinds = (int, float) if kind is float else kind
        good = isinstance(value, list) and all(isinstance(v, kinds) for v in value)
        if not good or (size is not None and len(value) < size):
            wanted = "" if size is None else f"{size} "
            self.refuse(name, value, f"{wanted}values of type {kind.__name__}")
        return value[:size]

    def token(self, name: str, default: int | None = None) -> int | None:
        """The id of a special token; None: the file names none."""
        token = self.get(name, default)
        if token is None:
            return None
        if type(token) is not int or not 0 <= token < len(self.tokens):
            self.refuse(name, token, f"numbers below {len(self.tokens)}")
        return token

    def roles(self, defaults: bool) -> dict[str, int]:
        """Ids of special tokens by role."""
        named = {
            role: self.token(key, default if defaults else None)
            for role, (key, default) in _ROLES.items()
        }
        # A text's own word that fills a batch, for example, stays a word.
        return {
            role: token
            for role, token in named.items()
            if token is not None
            and (role in ("bos_token", "eos_token") or self.types[token] != _NORMAL)
        }

    def ends(self, eos: int | None) -> tuple[int, ...]:
        """Tokens that end a text or an answer."""
        turn = self.token("eot_token_id")
        found = [eos, turn, self.token("eom_token_id")]
        if turn is None:
            found += [
                token
                for token, (text, kind) in enumerate(
                    zip(self.tokens, self.types, strict=True)
                )
                if kind == _CONTROL and text in _TURN_ENDS
            ]
        return tuple(dict.fromkeys(end for end in found if end is not None))

    def settings(
        self, roles: Mapping[str, int], added: Mapping[int, AddedToken], add_bos: bool
    ) -> TokenizerSettings:
        if add_bos and "bos_token" not in roles:
            raise UserError(
                f"{self.source} lacks tokenizer.ggml.bos_token_id, which every text "
                "begins with; download it again"
            )
        named = {
            role: AddedToken(self.tokens[token], special=True)
            for role, token in roles.items()
        }
        return TokenizerSettings(
            self.source,
            eos_ids=self.ends(roles.get("eos_token")),
            named=named,
            added=added,
            add_bos=add_bos,
            template=self._template(),
        )

    def _template(self) -> TemplateSource | None:
        key = "tokenizer.chat_template"
        programs = {
            name.removeprefix(f"{key}."): value
            for name, value in self._values.items()
            if name.startswith(f"{key}.")
        }
        if key in self._values:
            programs["default"] = self._values[key]
        return TemplateSource(programs, self.source) if programs else None

    def refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        raise UserError(
            f"{self.source}: tokenizer.ggml.{name}={value!r:.60} is not supported, "
            f"only {wanted}"
        )


def _byte_level(vocabulary: _Vocabulary) -> tuple[bytes, TokenizerSettings]:
    """A pipeline of the tokenizers package, as JSON."""
    import tokenizers as tk
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    name = vocabulary.get("pre", DEFAULT)
    if name not in PRE_TOKENIZERS:
        vocabulary.refuse("pre", name, ", ".join(PRE_TOKENIZERS))
    pre = PRE_TOKENIZERS[name]
    made = tk.Tokenizer(models.BPE())
    if pre.composes:
        made.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(tk.Regex(p), "isolated") for p in pre.patterns]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spell])
    made.decoder = decoders.ByteLevel()
    pipeline = json.loads(made.to_str())
    pipeline["model"] |= {
        "ignore_merges": pre.whole_words,
        "vocab": {text: token for token, text in enumerate(vocabulary.tokens)},
        "merges": vocabulary.array("merges", str),
    }
    roles = vocabulary.roles(defaults=False)
    add_bos = vocabulary.flag("add_bos_token", pre.adds_bos)
    added = _added(vocabulary, (_CONTROL, _USER_DEFINED))
    settings = vocabulary.settings(roles, added, add_bos)
    return json.dumps(pipeline).encode(), settings


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[bytes, TokenizerSettings]:
    """The model of the sentencepiece package that the scores were taken from."""
    count = len(vocabulary.tokens)
    scores = vocabulary.array("scores", float, count)
    roles = vocabulary.roles(defaults=True)
    unknown = vocabulary.token("unknown_token_id", 0)
    prefix = vocabulary.flag("add_space_prefix", True)
    types = [min(max(kind, _NORMAL), _BYTE) for kind in vocabulary.types]
    for token, kind in enumerate(types):
        if kind == _UNKNOWN:
            types[token] = _CONTROL
    types[unknown] = _UNKNOWN
    normal = {s for s, kind in zip(scores, types, strict=True) if kind == _NORMAL}
    if len(normal) == 1:
        # Of converters without the scores at hand; pieces are in order of their merges.
        scores = [-float(token) for token in range(count)]
    # Converters turn the mark back into spaces in added tokens alone.
    spellings = (
        text.replace(" ", SPACE) if kind == _USER_DEFINED else text
        for text, kind in zip(vocabulary.tokens, types, strict=True)
    )
    pieces = zip(spellings, map(float, scores), types, strict=True)
    trainer = {
        _MODEL_TYPE: _BPE,
        _VOCAB_SIZE: count,
        _BYTE_FALLBACK: _BYTE in types,
        _UNK_ID: unknown,
        _UNK_PIECE: vocabulary.tokens[unknown].encode(),
    }
    strip = vocabulary.flag("remove_extra_whitespaces", False)
    normalizer = {_NAME: b"identity", _ADD_PREFIX: prefix, _STRIP_SPACES: strip}
    data = serialise_model(pieces, trainer, normalizer)
    # Behind a token that is found in the text another prefix follows. Without prefixes
    # sentencepiece finds its own.
    kinds = (_CONTROL, _USER_DEFINED) if prefix else (_CONTROL,)
    add_bos = vocabulary.flag("add_bos_token", True)
    settings = vocabulary.settings(roles, _added(vocabulary, kinds), add_bos)
    return data, settings


def _added(vocabulary: _Vocabulary, kinds: tuple[int, ...]) -> dict[int, AddedToken]:
    """Tokens of some types, which are found in a text before it is cut."""
    return {
        token: AddedToken(text, special=kind == _CONTROL)
        for token, (text, kind) in enumerate(
            zip(vocabulary.tokens, vocabulary.types, strict=True)
        )
        if kind in kinds
    }


_KINDS = {
    "gpt2": (_byte_level, HuggingFaceTokenizer),
    "llama": (_sentencepiece, SentencePieceTokenizer),
}
