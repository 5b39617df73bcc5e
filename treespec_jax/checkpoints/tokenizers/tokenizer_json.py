"""`tokenizer.json`, the format of the tokenizers package."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from treespec_jax.checkpoints.tokenizers.base import BYTE, Tokenizer, damaged
from treespec_jax.checkpoints.tokenizers.settings import CONFIG, TokenizerSettings
from treespec_jax.errors import UserError


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the tokenizers package, encoded by that package.

    Added tokens of the settings are added, or take their flags. The token in front of a
    text is the one that the vocabulary's post-processor puts there; `add_bos` of the
    settings adds one where it puts none. Nothing is put behind a text, which is a
    prompt here, whatever the post-processor says.

    Args:
      data: JSON of the whole pipeline, the contents of a `tokenizer.json`.
      settings: what comes with it.

    Raises:
      UserError: the data is damaged, or decodes in a way that has no meaning token by
        token.
    """

    file_name = "tokenizer.json"

    def __init__(self, data: bytes, settings: TokenizerSettings):
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_buffer(data)
        except Exception:  # the package raises bare Exception
            raise damaged(settings.source, "a tokenizer.json") from None
        # Left over from training, where texts have one length.
        self._model.no_truncation()
        self._model.no_padding()
        self.core_size = _size(self._model.get_vocab(with_added_tokens=False))
        self._add_tokens(settings)
        find, roles = self._model.token_to_id, settings.named.items()
        named = {role: find(token.content) for role, token in roles}
        bos_id, eos_ids = settings.bos_id, settings.eos_ids
        if bos_id is None:
            bos_id = _front(self._model)
            if bos_id is None and settings.add_bos:
                bos_id = named.get("bos_token")
        if not eos_ids and named.get("eos_token") is not None:
            eos_ids = (named["eos_token"],)
        super().__init__(data, settings, bos_id, eos_ids)
        self.vocab_size = _size(self._model.get_vocab())
        self._added = self._model.get_added_tokens_decoder()
        self._read_decoder()

    def piece(self, token: int) -> str:
        self._check(token)
        return self._model.id_to_token(token) or ""

    def _model_tokens(self) -> dict[str, str]:
        return {} if self.bos_id is None else {"bos_token": self.piece(self.bos_id)}

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _add_tokens(self, settings: TokenizerSettings) -> None:
        """Adds what the settings know and the vocabulary does not, in order of id."""
        import tokenizers

        wanted = list(settings.added.values())
        known = self._model.get_added_tokens_decoder().values()
        contents = {token.content for token in (*known, *wanted)}
        others = (*settings.named.values(), *settings.others)
        wanted += [token for token in others if token.content not in contents]
        self._model.add_tokens(
            [tokenizers.AddedToken(**dataclasses.asdict(token)) for token in wanted]
        )
        for token_id, token in settings.added.items():
            found = self._model.token_to_id(token.content)
            if found != token_id:
                raise UserError(
                    f"{settings.source}: added token {token.content!r} is {found} "
                    f"there and {token_id} in {CONFIG}; download both again"
                )

    def _read_decoder(self) -> None:
        """Turns the decoder pipeline into its effect on the bytes of one token."""
        self._byte_level = self._byte_fallback = False
        self._replace: list[tuple[str, str]] = []
        # Without a decoder a text is its tokens with spaces between them.
        self._spaced = self._model.decoder is None
        self.leading_spaces = int(self._spaced)
        for step in _flatten(_state(self._model.decoder)):
            kind = step.get("type")
            if kind == "ByteLevel":
                self._byte_level = True
                self._byte_of = _byte_level_alphabet()
            elif kind == "ByteFallback":
                self._byte_fallback = True
            elif kind == "Metaspace":
                self._replace.append((step["replacement"], " "))
                self.leading_spaces = int(step.get("prepend_scheme") != "never")
            elif kind == "Replace" and "String" in step["pattern"]:
                self._replace.append((step["pattern"]["String"], step["content"]))
            elif kind == "Strip" and step["content"] == " " and not step["stop"]:
                self.leading_spaces = step["start"]
            elif kind == "Replace":
                raise UserError(
                    f"{self.source}: the decoder replaces what the regular expression "
                    f"{step['pattern'].get('Regex')!r:.60} finds, which has no meaning "
                    "token by token; only fixed texts are supported"
                )
            elif kind != "Fuse":
                raise UserError(
                    f"{self.source}: decoder {kind!r} is not supported; ByteLevel, "
                    "Metaspace, ByteFallback, Replace, Strip and Fuse are"
                )

    def _token_bytes(self, token: int) -> bytes:
        piece = self.piece(token)
        added = self._added.get(token)
        if added is not None and added.special:
            return b""
        if self._spaced:
            return f" {piece}".encode()
        # An added token is found in the text itself, not in its spelling by bytes.
        if self._byte_level and added is None:
            codes = [self._byte_of.get(char) for char in piece]
            return piece.encode() if None in codes else bytes(codes)
        if self._byte_level:
            return piece.encode()
        for old, new in self._replace:
            piece = piece.replace(old, new)
        match = self._byte_fallback and BYTE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.encode()


def _size(vocabulary: dict[str, int]) -> int:
    """Ids may have holes, so that their number is not enough."""
    return max(vocabulary.values(), default=-1) + 1


def _state(part: Any) -> dict[str, Any]:
    """The JSON of a part of the pipeline, {} if there is none."""
    return json.loads(part.__getstate__()) if part else {}


def _front(model: Any) -> int | None:
    """The token that the post-processor puts in front of a text, or None."""
    for step in _flatten(_state(model.post_processor), "processors"):
        kind = step.get("type")
        if kind == "TemplateProcessing":
            first = step["single"][0]
            if "SpecialToken" in first:
                return step["special_tokens"][first["SpecialToken"]["id"]]["ids"][0]
        elif kind in ("BertProcessing", "RobertaProcessing"):
            return step["cls"][1]
    return None


def _flatten(step: dict, inner: str = "decoders") -> list[dict]:
    if step.get("type") == "Sequence":
        return [leaf for part in step[inner] for leaf in _flatten(part, inner)]
    return [step] if step else []


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, by character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = printable + [256 + i for i in range(len(others))]
    pairs = zip(codes, printable + others, strict=True)
    return {chr(code): byte for code, byte in pairs}
