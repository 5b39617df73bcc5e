"""Fills a folder with texts that a target writes; see `training.answers`."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from treespec_jax.checks import check_float, check_int
from treespec_jax.config import SamplingParams
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.plan import prefill_plan
from treespec_jax.engine.request import Request
from treespec_jax.errors import UserError
from treespec_jax.training import resuming
from treespec_jax.training.answer_prompts import Prompt
from treespec_jax.training.answers import Text, Writer, check_identity

# Between two writes to the disk.
_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the texts, and how they are made.

    Attributes:
      output: folder.
      sampling: of every text, but for temperature and seed; prompts may have their own
        sampling, which counts but for max_tokens.
      temperatures: of the texts in turn.
      seed: of the first text; each has the next one.
      shard: (I, N): of N processes this one makes the texts I, I + N, I + 2 N, …
      max_minutes: after these no text is begun; 0: no limit.
      progress: show a progress bar.
    """

    output: str | Path
    sampling: SamplingParams = SamplingParams(max_tokens=512)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    seed: int = 0
    shard: tuple[int, int] = (0, 1)
    max_minutes: float = 0.0
    progress: bool = True

    def __post_init__(self):
        if not str(self.output):
            raise UserError("no output folder: give --output=FOLDER")
        for value in self.temperatures:
            check_float("temperatures", value, 0)
        if not self.temperatures:
            raise UserError("--temperatures is empty; give 0, 1 or 0,1 for example")
        check_int("seed", self.seed, 0)
        check_float("max_minutes", self.max_minutes, 0)
        index, count = self.shard
        if not 0 <= index < count:
            raise UserError(
                f"--shard={index}/{count}: give I/N with I from 0 to N - 1, 0/2 and "
                "1/2 for example"
            )

    def params(self, index: int, prompt: Prompt) -> SamplingParams:
        """How the text of that number is sampled."""
        temperature = self.temperatures[index % len(self.temperatures)]
        own = prompt.sampling
        return dataclasses.replace(
            own or self.sampling,
            max_tokens=self.sampling.max_tokens,
            temperature=temperature if own is None else own.temperature,
            seed=(self.seed + index) % 2**32,
        )

    def identity(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What a run that goes on must share, as plain values."""
        digest = hashlib.sha256()
        for prompt in prompts:
            digest.update(f"{prompt.source}\n{prompt.sampling}\n".encode())
            digest.update(np.array(prompt.ids, np.int32).tobytes())
        names = ("max_tokens", "top_k", "top_p", "min_p", "ignore_eos")
        return {
            "texts": len(prompts),
            "prompts": digest.hexdigest()[:16],
            "temperatures": list(self.temperatures),
            "seed": self.seed,
            **{name: getattr(self.sampling, name) for name in names},
        }


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
      finished: all texts of the shard are there; otherwise the same command goes on.
      interrupted: a signal ended the run.
      texts: written by this run.
      tokens: that the target wrote in it.
      seconds: that it took, compilation left out.
      total_texts: in the folder, those of other shards included.
      total_tokens: of these texts, prompts included.
    """

    finished: bool
    interrupted: bool
    texts: int
    tokens: int
    seconds: float
    total_texts: int
    total_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens written per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def identity(llm, target: str, settings: Settings, prompts: Sequence[Prompt]):
    """All that decides the texts of a folder, as nested plain values."""
    return {
        "target": target,
        "dtype": llm.dtype,
        "cache_dtype": llm.engine.config.cache_dtype,
        "rule": llm.engine.speculation.rule.name,
        "max_len": llm.engine.config.max_len,
        **settings.identity(prompts),
    }


def generate(
    llm,
    target: str,
    prompts: Sequence[Prompt],
    settings: Settings,
    on_written: Callable[[Text], None] | None = None,
) -> Result:
    """Generates, or goes on with, the texts that go on from some prompts.

    A run that is stopped in any way and repeated leaves the texts of one that was not:
    each depends on its prompt, its number and the settings alone. At SIGTERM and SIGINT
    it stops after the running dispatch and loses the texts under way.

    Args:
      llm: an `LLM`.
      target: its name, for the folder's metadata.
      prompts: one per text, each shorter than max_len.
      settings: see there.
      on_written: gets every text that this run has written.

    Raises:
      UserError: a lossy way of decoding, a prompt that is too long, or a folder that
        cannot be used, see `answers.Writer`.
      ValueError: the LLM answers somebody else.
    """
    engine = llm.engine
    if engine.speculation.cascade or engine.speculation.rule.name == "typical":
        raise UserError(
            "a cascade or the typical rule writes what the target would not; take "
            "--rule=exact"
        )
    given = [settings.sampling, *(p.sampling for p in prompts if p.sampling)]
    if any(params.adaptive_temperature for params in given):
        raise UserError(
            "adaptive_temperature writes what the target would not; leave it out"
        )
    described = identity(llm, target, settings, prompts)
    check_identity(settings.output, described)
    vocab = llm.config.vocab_size
    with (
        llm.exclusive() as engine,
        Writer(settings.output, described, vocab, settings.shard) as writer,
    ):
        return _Run(engine, prompts, settings, on_written).carry_out(writer)


@dataclasses.dataclass
class _UnderWay:
    """A request of the engine, and which text it becomes."""

    index: int
    prompt: Prompt
    request: Request

    def text(self) -> Text:
        return Text(
            self.index,
            [*self.request.prompt, *self.request.tokens],
            len(self.request.prompt),
            self.request.params.temperature,
            self.prompt.source,
        )


class _Run:
    """One process's part of the texts."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        settings: Settings,
        on_written: Callable[[Text], None] | None,
    ):
        self._engine = engine
        self._prompts = prompts
        self._settings = settings
        self._on_written = on_written
        self._under_way: dict[int, _UnderWay] = {}
        # Tokens of finished texts of this run.
        self._tokens = 0

    def carry_out(self, writer: Writer) -> Result:
        index, count = self._settings.shard
        mine = range(index, len(self._prompts), count)
        missing = [i for i in mine if i not in writer.done]
        if missing:
            self._compile(missing)
        began = time.monotonic()
        bar = tqdm.tqdm(
            total=len(mine),
            initial=len(mine) - len(missing),
            unit="text",
            disable=not self._settings.progress,
            mininterval=2,
            miniters=0,
        )
        try:
            with bar, resuming.interruption() as interruption:
                written = self._generate(iter(missing), writer, bar, interruption)
        finally:
            # Nothing of an interrupted run may stay in the slots.
            for each in self._under_way.values():
                self._engine.cancel(each.request)
            self._engine.drain()
        return Result(
            finished=written == len(missing),
            interrupted=interruption.is_set(),
            texts=written,
            tokens=self._tokens,
            seconds=time.monotonic() - began,
            total_texts=len(writer.done),
            total_tokens=writer.tokens,
        )

    def _compile(self, missing: Sequence[int]) -> None:
        chunks = self._engine.config.prefill_chunks
        lengths = {len(self._prompts[i].ids) for i in missing}
        plans = [prefill_plan(length - 1, chunks) for length in lengths]
        sizes = {size for plan in plans for _, size, _ in plan}
        first = missing[0]
        params = self._settings.params(first, self._prompts[first])
        self._engine.compile(sorted(sizes), every_shape=False, params=params)

    def _generate(self, missing: Iterator[int], writer: Writer, bar, interruption):
        """Runs until all is done, time is over or a signal comes; texts written."""
        minutes = self._settings.max_minutes
        began = time.monotonic()
        end = began + 60 * minutes if minutes else math.inf
        done: list[_UnderWay] = []
        written, saved = 0, began
        while not interruption.is_set():
            if time.monotonic() < end:
                self._submit(missing)
            else:
                self._drop_waiting()
            if not self._under_way:
                break
            for request in self._engine.advance():
                if request.finish_reason:
                    done.append(self._under_way.pop(id(request)))
            now = time.monotonic()
            if done and now - saved >= _SECONDS:
                written, saved = written + self._write(done, writer, bar), now
            bar.set_postfix_str(f"{self._rate(done, now - began):,.0f} tok/s", False)
            bar.update(0)
        return written + self._write(done, writer, bar)

    def _submit(self, missing: Iterator[int]) -> None:
        """Lets as many requests wait as run, so that no slot stays free."""
        room = 2 * self._engine.config.max_batch - len(self._under_way)
        for _, index in zip(range(room), missing, strict=False):
            prompt = self._prompts[index]
            request = Request(list(prompt.ids), self._settings.params(index, prompt))
            self._engine.submit(request)
            self._under_way[id(request)] = _UnderWay(index, prompt, request)

    def _drop_waiting(self) -> None:
        """Takes back what has not begun."""
        for key, each in list(self._under_way.items()):
            if not each.request.tokens:
                self._engine.cancel(each.request)
                del self._under_way[key]

    def _write(self, done: list[_UnderWay], writer: Writer, bar) -> int:
        """Writes texts and forgets them; how many."""
        count = len(done)
        texts = [each.text() for each in done]
        writer.append(texts)
        for text in texts if self._on_written else ():
            self._on_written(text)
        self._tokens += sum(len(each.request.tokens) for each in done)
        done.clear()
        bar.update(count)
        return count

    def _rate(self, done: list[_UnderWay], seconds: float) -> float:
        """Tokens per second since the run began, those of unfinished texts too."""
        running = [*done, *self._under_way.values()]
        tokens = self._tokens + sum(len(each.request.tokens) for each in running)
        return tokens / seconds
