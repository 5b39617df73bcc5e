"""A folder of texts that a target wrote, as token ids, and training rows made of them.

| file | what |
| --- | --- |
| `metadata.json` | the settings that decide the texts, the size of the vocabulary |
| `tokens-I-of-N.bin` | uint16 or uint32, text after text, prompts included |
| `texts-I-of-N.jsonl` | a line per text: its number, lengths, temperature, source |

Process I of N appends to files of its own. Tokens are on the disk before their line is:
a process can be killed at any moment. What no line names, the next one cuts off.
`training.answering` fills such a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treespec_jax.errors import UserError
from treespec_jax.training import data, resuming
from treespec_jax.training.settings import Source

METADATA = "metadata.json"
# Source of texts in which a chat model wrote both sides.
DIALOGUES = "dialogues"
# Of two dialogues that begin with the same so many tokens the later one is dropped.
ALIKE = 32


@dataclasses.dataclass(frozen=True)
class Text:
    """One finished text.

    Attributes:
      index: its number among the texts of the folder.
      tokens: ids, those of the prompt first.
      prompt_tokens: how many are the prompt's; the target wrote the others.
      temperature: that they were sampled at.
      source: where the prompt came from.
    """

    index: int
    tokens: Sequence[int]
    prompt_tokens: int
    temperature: float
    source: str


class Writer:
    """Appends texts to a folder; a context manager.

    For example

      with Writer("runs/answers", {"seed": 0}, vocab_size=32000) as writer:
          if 7 not in writer.done:
              writer.append([Text(7, [1, 15, 3], 1, 0.0, "questions.jsonl")])

    Args:
      folder: made if it is not there.
      identity: plain values that decide the texts.
      vocab_size: token ids are below it.
      shard: (I, N), which of N processes this is.

    Attributes:
      done: numbers of the texts in the folder, of all shards.
      tokens: in the folder, of all shards.

    Raises:
      UserError: the folder holds texts of other settings, is damaged or cannot be
        written, or another process writes this shard.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        vocab_size: int,
        shard: tuple[int, int] = (0, 1),
    ):
        self._folder = Path(folder).expanduser()
        identity = json.loads(json.dumps(identity))  # as it will be read back
        metadata = {"identity": identity, "vocab_size": vocab_size}
        # Before anything is made: a refused command leaves no trace.
        check_identity(self._folder, identity)
        self._dtype = _dtype(vocab_size)
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / METADATA).exists():
            _write_whole(self._folder / METADATA, json.dumps(metadata, indent=2) + "\n")
        texts = _file(self._folder, shard)
        self._texts, self._tokens = texts.open("ab"), _tokens(texts).open("ab")
        try:
            self._lock(texts)
            self._cut(texts)
        except BaseException:
            self.close()
            raise
        self.done: set[int] = set()
        self.tokens = 0
        for file in sorted(self._folder.glob("texts-*.jsonl")):
            lines, _ = _lines(file)
            self.done.update(line["index"] for line in lines)
            self.tokens += sum(line["tokens"] for line in lines)

    def append(self, texts: Iterable[Text]) -> None:
        """Writes texts; they are on the disk when it returns."""
        lines, tokens = [], []
        for text in texts:
            values = {**vars(text), "tokens": len(text.tokens)}
            lines.append(json.dumps(values) + "\n")
            tokens.append(np.asarray(text.tokens, self._dtype).tobytes())
            self.done.add(text.index)
            self.tokens += len(text.tokens)
        for file, parts in (
            (self._tokens, tokens),
            (self._texts, [line.encode() for line in lines]),
        ):
            file.write(b"".join(parts))
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Lets another process write the shard."""
        self._texts.close()
        self._tokens.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _lock(self, texts: Path) -> None:
        try:
            fcntl.flock(self._texts, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process writes {texts}; wait for it, or give each its --shard"
            ) from None

    def _cut(self, texts: Path) -> None:
        """Takes off what an interrupted process left unfinished."""
        lines, whole = _lines(texts)
        count = sum(line["tokens"] for line in lines)
        _check_tokens(_tokens(texts), count, self._dtype)
        self._texts.truncate(whole)
        self._tokens.truncate(count * self._dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class MaskedRows:
    """Packed texts.

    Attributes:
      tokens: int32 [rows, T + 1]; the last token of a row is the first of the next.
      written: bool [rows, T + 1], tokens that the target wrote by itself.
    """

    tokens: np.ndarray
    written: np.ndarray


@dataclasses.dataclass(frozen=True)
class Answers:
    """Texts of a target, n of them with N tokens together.

    Attributes:
      tokens: int32 [N], text after text.
      starts: int64 [n + 1], where each begins, and N.
      prompt_tokens: int32 [n], the first so many tokens of a text are its prompt's.
      temperatures: float32 [n], that the rest was sampled at.
      sources: n names of where the prompts came from.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_tokens: np.ndarray
    temperatures: np.ndarray
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def text(self, number: int) -> np.ndarray:
        """int32, the tokens of one text, those of the prompt first."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]

    def rows(
        self, row_tokens: int, held_out: float, seed: int = 0
    ) -> tuple[MaskedRows, MaskedRows]:
        """Rows to train on, and rows of other texts to measure on.

        Whole texts are held out; of a single one, its end. The texts of each part
        follow one another in a random order and are cut into rows wherever those end;
        what does not fill a row at the end is dropped.

        Args:
          row_tokens: T.
          held_out: share of the texts to hold out, in (0, 1); more if these do not fill
            a row.
          seed: decides which, and the order.

        Raises:
          UserError: a part is shorter than a row.
        """
        texts, order = self, np.random.default_rng(seed).permutation(len(self))
        if len(self) == 1:
            texts, order = self._in_two(row_tokens, held_out), np.array([1, 0])
        count = max(1, round(len(self) * held_out))
        tokens = np.cumsum(np.diff(texts.starts)[order])
        count = max(count, int(np.searchsorted(tokens, row_tokens + 1)) + 1)
        train = texts._packed(order[count:], row_tokens)
        held = texts._packed(order[:count], row_tokens)
        for rows, what in ((train, "to train on"), (held, f"held out ({held_out:g})")):
            if not len(rows.tokens):
                raise UserError(
                    f"{len(self)} texts of {len(self.tokens)} tokens leave no row of "
                    f"{row_tokens} tokens {what}; generate more texts, or take "
                    "shorter rows"
                )
        return train, held

    def _in_two(self, row_tokens: int, held_out: float) -> Answers:
        """The one text as two: what is held out, a row at least, is the second."""
        total = len(self.tokens)
        end = max(round(total * held_out), row_tokens + 1)
        return dataclasses.replace(
            self,
            starts=np.array([0, max(0, total - end), total]),
            prompt_tokens=np.array([self.prompt_tokens[0], 0], np.int32),
            temperatures=np.repeat(self.temperatures, 2),
            sources=self.sources * 2,
        )

    def _packed(self, order: np.ndarray, row_tokens: int) -> MaskedRows:
        """Rows of some texts, in that order."""
        lengths = np.diff(self.starts)[order]
        begins = np.cumsum(lengths) - lengths
        within = np.arange(lengths.sum()) - np.repeat(begins, lengths)
        stream = self.tokens[np.repeat(self.starts[order], lengths) + within]
        written = within >= np.repeat(self.prompt_tokens[order], lengths)
        return MaskedRows(data.cut(stream, row_tokens), data.cut(written, row_tokens))


def read_answers(folder: str | Path) -> Answers:
    """The texts of a folder, by number, while it is being filled or later.

    Texts without a token of the target's are left out, and dialogues that begin as an
    earlier one does.

    Raises:
      UserError: no such folder, a damaged one, or no text in it yet.
    """
    folder = Path(folder).expanduser()
    dtype = _dtype(_metadata(folder)["vocab_size"])
    found: dict[int, tuple[dict[str, Any], np.ndarray]] = {}
    for file in sorted(folder.glob("texts-*.jsonl")):
        lines, _ = _lines(file)
        ends = np.cumsum([line["tokens"] for line in lines], dtype=np.int64)
        count = int(ends[-1]) if lines else 0
        _check_tokens(_tokens(file), count, dtype)
        tokens = np.fromfile(_tokens(file), dtype, count)
        for line, end in zip(lines, ends, strict=True):
            text = tokens[end - line["tokens"] : end]
            found.setdefault(line["index"], (line, text))
    beginnings, texts = set(), []
    for _, (line, tokens) in sorted(found.items()):
        prompt = line["prompt_tokens"]
        if len(tokens) <= prompt:
            continue
        if line["source"] == DIALOGUES:
            beginning = tokens[prompt : prompt + ALIKE].tobytes()
            if beginning in beginnings:
                continue
            beginnings.add(beginning)
        texts.append((tokens, prompt, line["temperature"], line["source"]))
    if not texts:
        raise UserError(f"{folder} holds no text yet; repeat generate_answers")
    return _answers(texts)


def read_texts(sources: Sequence[Source], tokenizer) -> Answers:
    """Text files as if the target had written them, to train without its answers.

    Args:
      sources: see `data.read_documents`; a document is a text.
      tokenizer: of the target (`checkpoints.tokenizers.Tokenizer`). Each text stands
        between the tokens that begin and end one, where there are any.

    Raises:
      UserError: a file that cannot be read or holds no text.
    """
    parts = []
    for source in sources:
        documents = data.read_documents(source)
        parts.append(from_texts(documents, tokenizer, Path(source.path).name))
    return join(parts)


def from_texts(documents: Iterable[str], tokenizer, source: str = "texts") -> Answers:
    """Texts as if the target had written them.

    Args:
      documents: one at least.
      tokenizer: as of `read_texts`.
      source: a name for all of them.
    """
    end = list(tokenizer.eos_ids[:1])
    prompt = int(tokenizer.bos_id is not None)
    return _answers(
        [
            (np.array([*tokenizer.encode(text), *end], np.int32), prompt, 1.0, source)
            for text in documents
        ]
    )


def join(parts: Sequence[Answers]) -> Answers:
    """All texts of several folders or files, of one vocabulary."""
    offsets = np.cumsum([0, *(len(part.tokens) for part in parts)])
    starts = [
        part.starts[:-1] + offset
        for part, offset in zip(parts, offsets[:-1], strict=True)
    ]
    return Answers(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([*starts, offsets[-1:]]),
        np.concatenate([part.prompt_tokens for part in parts]),
        np.concatenate([part.temperatures for part in parts]),
        sum((part.sources for part in parts), ()),
    )


def check_identity(folder: str | Path, identity: Mapping[str, Any]) -> None:
    """Raises UserError if a folder holds texts of other settings, naming the first."""
    if (Path(folder) / METADATA).exists():
        resuming.check_same(_metadata(Path(folder))["identity"], identity, folder)


def _answers(texts: Sequence[tuple[np.ndarray, int, float, str]]) -> Answers:
    """Of tokens, prompt tokens, temperature and source of each text."""
    tokens, prompts, temperatures, sources = zip(*texts, strict=True)
    return Answers(
        np.concatenate(tokens).astype(np.int32),
        np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        np.array(prompts, np.int32),
        np.array(temperatures, np.float32),
        sources,
    )


def _metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return {name: values[name] for name in ("identity", "vocab_size")}
    except OSError as error:
        raise UserError(
            f"{folder} holds no texts of generate_answers: {METADATA}: {error.strerror}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; generate into another folder") from None


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _file(folder: Path, shard: tuple[int, int]) -> Path:
    return folder / f"texts-{shard[0]}-of-{shard[1]}.jsonl"


def _tokens(texts: Path) -> Path:
    """The file of the tokens that belong to a file of lines."""
    return texts.with_name(texts.stem.replace("texts", "tokens") + ".bin")


def _lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Whole lines of a file, and their bytes; Raises UserError: one is damaged."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        # One document is parsed in a fraction of the time that its lines take.
        joined = b",".join(content[:whole].splitlines())
        lines = json.loads(b"[" + joined + b"]")
        wanted = {field.name for field in dataclasses.fields(Text)}
        if not all(wanted <= line.keys() for line in lines):
            raise ValueError("a line lacks a value")
    except (ValueError, AttributeError):
        raise UserError(f"{file} is damaged; generate into another folder") from None
    return lines, whole


def _check_tokens(file: Path, count: int, dtype: np.dtype) -> None:
    """Raises UserError unless a file holds so many tokens at least."""
    size = 0
    with contextlib.suppress(FileNotFoundError):
        size = file.stat().st_size
    if size < count * dtype.itemsize:
        raise UserError(
            f"{file} holds {size // dtype.itemsize} of {count} tokens: it is damaged; "
            "generate into another folder"
        )


def _write_whole(file: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, and on the disk."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, file)
