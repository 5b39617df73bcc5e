"""What a user holds: texts in, texts out."""

from __future__ import annotations

import dataclasses
import operator
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax import limits
from treespec_jax.acceptance import facts, rules
from treespec_jax.checkpoints import LoadedModel, load
from treespec_jax.checkpoints.chat import (
    Message,
    check_conversations,
    check_messages,
)
from treespec_jax.checkpoints.tokenizers import TextStream, Tokenizer
from treespec_jax.config import (
    DEFAULT_TAU,
    EngineConfig,
    SamplingParams,
    SpeculativeConfig,
    from_mapping,
)
from treespec_jax.drafting.draft_model import DraftModel
from treespec_jax.drafting.none import NoDrafter
from treespec_jax.engine.engine import Engine, Request
from treespec_jax.engine.stats import Stats, total
from treespec_jax.errors import UserError
from treespec_jax.models.memory import use_huge_pages
from treespec_jax.sharding import make_mesh
from treespec_jax.trees import shapes
from treespec_jax.tuning.calibration import TreeRecord

Prompt = str | Sequence[int]
Messages = Sequence[Message]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished text.

    Attributes:
      prompt: as given; for a chat the messages.
      text: what follows the prompt; "" without a tokenizer.
      token_ids: emitted tokens, the end-of-text token included if there was one.
      finish_reason: "stop" (end-of-text token or stop text) or "length" (max_tokens,
        max_len, or no free page).
      logprobs: natural log p of each token under the target, if asked for.
      stats: of this request.
      records: of its trees, if the LLM keeps them.
    """

    prompt: Prompt | Messages
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None
    stats: Stats
    records: list[TreeRecord] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Generation(Sequence):
    """Completions in the order of their prompts.

    Attributes:
      completions: one per prompt.
      stats: summed counts; times are wall times of the whole call.
    """

    completions: list[Completion]
    stats: Stats

    def __getitem__(self, index):
        return self.completions[index]

    def __len__(self) -> int:
        return len(self.completions)


class LLM:
    """A target model, optionally with a drafter that makes it faster.

    With speculation the emitted tokens are those of plain decoding at equal seed; only
    the speed differs.

    Args:
      model: path of a checkpoint (see `checkpoints.load`), or a loaded one.
      speculative: fields of `SpeculativeConfig` (method, model, tree, tau); None is
        plain decoding.
      dtype: of weights, activations and cache ("float32", "bfloat16"); None: float32
        on a CPU, where it is the quick one, else the checkpoint's own.
      max_batch: prompts decoded together.
      max_len: tokens per slot, prompt and output together; None: the model's own
        limit, 4096 at most.
      page_size: cache rows per page.
      num_pages: pages in all; None: enough for max_batch texts of max_len.
      steps_per_dispatch: speculation steps per host round trip.
      prefill_chunks: row counts of the compiled prefill passes.
      lanes: see `EngineConfig`.
      cache_dtype: "int8" for a rounded cache, which is lossy; see `EngineConfig`.
      mesh: of devices that share both models by tensor parallelism, such as "tensor:4"
        or what `sharding.make_mesh` gives; None: one device, or where a loaded model
        lies.
      record: keep what became of every drafted tree (`Completion.records`), from which
        `tuning.calibration` makes a reliability table and fits tau.

    Attributes:
      notes: what of the checkpoints was left out, and what to know of the
        vocabularies of target and drafter, a line each.

    Raises:
      UserError: a checkpoint that cannot be read, vocabularies that differ, a
        malformed tree, a rule that would not be lossless for it, or sizes that do not
        fit.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel,
        *,
        speculative: Mapping[str, Any] | None = None,
        dtype: str | None = None,
        max_batch: int = 8,
        max_len: int | None = None,
        page_size: int = 64,
        num_pages: int | None = None,
        steps_per_dispatch: int = 8,
        prefill_chunks: Sequence[int] = (16, 128),
        lanes: int | None = None,
        cache_dtype: str = "",
        mesh: str | jax.sharding.Mesh | None = None,
        record: bool = False,
    ):
        spec = from_mapping(
            SpeculativeConfig,
            dict(speculative) if speculative else {"method": "none"},
            "speculative",
        )
        # Everything that can be wrong is checked before weights are read.
        shape = shapes.parse("none" if spec.method == "none" else spec.tree)
        plain = shape.depth == 0
        draws = facts.choose_draws(spec.rule, spec.draws, shape, spec.cascade)
        if not plain and spec.model is None:
            raise UserError(
                "speculative method 'draft_model' needs a model; give its path"
            )
        sizes = {
            "max_batch": max_batch,
            "page_size": page_size,
            "num_pages": num_pages,
            "steps_per_dispatch": steps_per_dispatch,
            "prefill_chunks": tuple(prefill_chunks),
            "lanes": lanes,
            "cache_dtype": cache_dtype,
        }
        EngineConfig(**sizes, max_len=4096 if max_len is None else max_len)

        if dtype is None and jax.default_backend() == "cpu":
            dtype = "float32"
        if isinstance(mesh, str):
            mesh = make_mesh(mesh)
        target = _loaded(model, dtype, mesh)
        draft = None if plain else _loaded(spec.model, target.dtype, mesh)
        longest = target.config.max_positions
        left_out = [*target.notes, *(draft.notes if draft is not None else ())]
        self.notes = (*left_out, *limits.check_pair(target, draft))
        use_huge_pages(target.model)
        if draft is not None:
            use_huge_pages(draft.model)
            longest = min(longest, draft.config.max_positions)
        if max_len is None:
            max_len = min(longest, 4096)
        if max_len > longest:
            raise UserError(
                f"max_len={max_len} is past the model's {longest} positions; lower it"
            )
        drafter = NoDrafter()
        if draft is not None:
            rows = target.config.vocab_size
            tau = spec.tau or draft.tau or DEFAULT_TAU
            drafter = DraftModel(draft.model, shape, tau, rows, draws)
        self.config = target.config
        self.tokenizer: Tokenizer | None = target.tokenizer
        self.dtype = str(jnp.dtype(target.dtype))
        self.drafter = drafter
        self.engine = Engine(
            target.model,
            drafter,
            EngineConfig(**sizes, max_len=max_len),
            target.config.eos_ids,
            None if plain else rules.make(spec),
            rules.make_cascade(spec),
            record,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generation:
        """Continues every prompt.

        Args:
          prompts: a text, several texts, or lists of token ids (taken as they are).
          params: one for all, or one per prompt; None is greedy with the defaults.

        Raises:
          UserError: an empty prompt, one longer than max_len, or text without a
            tokenizer.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        prompts = list(prompts)
        if prompts and all(isinstance(p, (int, np.integer)) for p in prompts):
            prompts = [prompts]
        params = _one_each(params, len(prompts), "prompts")
        return self._serve(
            [self._reader(p, s) for p, s in zip(prompts, params, strict=True)]
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Answers conversations, written out by the checkpoint's chat template.

        Args:
          messages: one conversation, [{"role": "user", "content": "…"}, …], or several.
          params: as for `generate`.
          variables: for the template to see; see `ChatTemplate.render`.

        Raises:
          UserError: no chat template, malformed messages, messages that the template
            refuses, or that have no room in max_len.
        """
        conversations = check_conversations(messages)
        params = _one_each(params, len(conversations), "conversations")
        return self._serve(
            [
                self._chat_reader(c, s, variables)
                for c, s in zip(conversations, params, strict=True)
            ]
        )

    def _serve(self, readers: list[_Reader]) -> Generation:
        engine = self.engine
        before = engine.prefill_seconds, engine.decode_seconds
        try:
            for reader in readers:
                engine.submit(reader.request)
            while engine.busy:
                engine.advance()
                for reader in readers:
                    reader.read(engine)
        finally:
            # Nothing of an interrupted call may stay in the slots.
            for reader in readers:
                if reader.request.finish_reason is None:
                    engine.cancel(reader.request)
        for reader in readers:
            reader.read(engine)
        completions = [reader.completion() for reader in readers]
        return Generation(
            completions,
            total(
                [c.stats for c in completions],
                engine.prefill_seconds - before[0],
                engine.decode_seconds - before[1],
            ),
        )

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Continues one prompt and yields its text as it comes.

        Pieces never split a character, and nothing is yielded that may still turn out
        to belong to a stop text.
        """
        return Stream(self, self._reader(prompt, params or SamplingParams()))

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Stream:
        """Answers one conversation as `chat` does, and yields the text as it comes."""
        messages = check_messages(messages)
        params = params or SamplingParams()
        return Stream(self, self._chat_reader(messages, params, variables))

    def _reader(self, prompt: Prompt, params: SamplingParams) -> _Reader:
        if isinstance(prompt, str):
            # A token that begins every text is enough of a prompt.
            ids = self._tokenizer().encode(prompt)
        else:
            ids = _token_ids(prompt)
        return self._checked(prompt, ids, params, ids)

    def _chat_reader(self, messages, params, variables) -> _Reader:
        ids = self._tokenizer().encode_chat(messages, variables)
        # An answer is a text of its own, not the continuation of a line.
        return self._checked(messages, ids, params, ())

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                "the checkpoint has no tokenizer; put one beside it or give the "
                "prompt as token ids"
            )
        return self.tokenizer

    def _checked(self, prompt, ids, params, context) -> _Reader:
        limits.check_tokens(ids, self.config.vocab_size)
        limits.check_bias(params.logit_bias, self.config.vocab_size)
        if params.stop and self.tokenizer is None:
            raise UserError("stop texts need a tokenizer; the checkpoint has none")
        request = Request(prompt=ids, params=params)
        self.engine.check(request)
        return _Reader(prompt, request, self.tokenizer, context)


class _Reader:
    """Turns a request's tokens into text, which goes on that of `context`.

    Looks for stop texts.
    """

    def __init__(
        self,
        prompt: Prompt | Messages,
        request: Request,
        tokenizer: Tokenizer | None,
        context: Sequence[int],
    ):
        self.prompt = prompt
        self.request = request
        self._stop = request.params.stop
        self._stream = TextStream(tokenizer, context) if tokenizer else None
        self._seen = 0
        self._text = ""
        self._given = 0
        self._ended = False

    def read(self, engine: Engine) -> None:
        """Takes in what the request emitted since; ends it at a stop text."""
        request = self.request
        if self._stream is None or self._ended:
            return
        while self._seen < len(request.tokens):
            token = request.tokens[self._seen]
            self._seen += 1
            self._append(self._stream.push([token]))
            if self._ended:
                self._cut(engine)
                return
        if request.finish_reason:
            self._append(self._stream.flush())
            self._ended = True

    def _append(self, piece: str) -> None:
        longest = max((len(stop) for stop in self._stop), default=0)
        begin = max(0, len(self._text) - longest + 1)
        self._text += piece
        found = [at for s in self._stop if (at := self._text.find(s, begin)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self._ended = True

    def _cut(self, engine: Engine) -> None:
        """Ends the request at the token that completed a stop text."""
        request = self.request
        engine.cancel(request)
        request.finish_reason = "stop"
        request.cut(self._seen)

    def take(self) -> str:
        """Text not taken yet, less an end that could be the start of a stop text."""
        end = len(self._text)
        if not self._ended:
            end -= max((_overlap(self._text, stop) for stop in self._stop), default=0)
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def completion(self) -> Completion:
        request = self.request
        return Completion(
            prompt=self.prompt,
            text=self._text,
            token_ids=request.tokens,
            finish_reason=request.finish_reason,
            logprobs=request.logprobs if request.params.logprobs else None,
            stats=request.stats,
            records=request.records,
        )


class Stream(Iterator[str]):
    """Pieces of one text.

    Attributes:
      completion: the finished text, once the pieces have run out; else None.
    """

    def __init__(self, llm: LLM, reader: _Reader):
        self.completion: Completion | None = None
        self._engine = llm.engine
        self._reader = reader
        self._engine.submit(reader.request)

    def __next__(self) -> str:
        while self.completion is None:
            if self._reader.request.finish_reason is None:
                # One step a dispatch: each piece is shown as soon as it is known.
                self._engine.advance(max_steps=1)
            self._reader.read(self._engine)
            piece = self._reader.take()
            if self._reader.request.finish_reason is not None:
                self.completion = self._reader.completion()
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Gives the text up and frees its slot."""
        if self.completion is None:
            self._engine.cancel(self._reader.request)
            self.completion = self._reader.completion()

    def __del__(self):
        self.close()


def _one_each(params, count: int, what: str) -> list[SamplingParams]:
    params = params if params is not None else SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise UserError(
            f"{count} {what} but {len(params)} sampling parameters; give one for all "
            "or one for each"
        )
    return list(params)


def _token_ids(prompt: Sequence[int]) -> list[int]:
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise UserError(
            f"a prompt must be text or token ids, got {reprlib.repr(prompt)}"
        ) from None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _loaded(model: str | Path | LoadedModel, dtype, mesh) -> LoadedModel:
    if isinstance(model, LoadedModel):
        if mesh is not None:
            raise UserError(
                "a loaded model stays where it is; give its path, or pass the mesh to "
                "checkpoints.load instead"
            )
        return model
    if not isinstance(model, (str, Path)):
        raise UserError(f"model must be a path or a loaded model, got {model!r}")
    return load(model, dtype=dtype, mesh=mesh)
