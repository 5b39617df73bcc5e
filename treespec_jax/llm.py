"""What a user holds: texts in, texts out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from treespec_jax import disk_cache, limits, pairs, speculation
from treespec_jax.arguments import (
    as_params,
    as_prompt,
    as_prompts,
    each_params,
    single_params,
    with_token_ids,
)
from treespec_jax.beam_texts import Beams, search
from treespec_jax.checkpoints import drafters
from treespec_jax.checkpoints.chat import check_conversations, check_messages
from treespec_jax.checkpoints.drafters import LoadedDrafter
from treespec_jax.checkpoints.recycle_table import TableFile
from treespec_jax.checkpoints.tokenizers import Tokenizer, check_pair
from treespec_jax.checks import as_bool, as_int, from_mapping
from treespec_jax.completions import Completion, Generation, Messages, OnFinish, Prompt
from treespec_jax.config import EngineSettings, SamplingParams, SpeculativeConfig
from treespec_jax.cost_file import CostFile
from treespec_jax.engine import warming
from treespec_jax.engine.beams import BeamParams
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.engine.stats import total
from treespec_jax.errors import UserError
from treespec_jax.models.memory import use_huge_pages
from treespec_jax.progress import Progress
from treespec_jax.sharding import make_mesh
from treespec_jax.texts import AsyncStream, Reader, Stream, completions_of, telling
from treespec_jax.worker import AsyncBell, Bell, Call, Worker

__all__ = ["LLM", "AsyncStream", "Completion", "Generation", "Stream"]

# What goes with the target.
FITTING = SpeculativeConfig()


class LLM:
    """A target model, optionally with a drafter that makes it faster.

    With speculation the emitted tokens are those of plain decoding at equal seed; only
    the speed differs.

    Any thread and any task of asyncio may use it, also at the same time: one thread
    runs the engine (`worker`), and the requests of all callers share its batch. A
    caller that is interrupted or cancelled takes its own requests along and nobody
    else's. Where the engine fails (no memory, a program that does not compile), those
    whose requests it was working on get the error, and the others go on.

    Args:
      model: path or name of a checkpoint (see `checkpoints.load`), a description of
        one, or a loaded one.
      speculative: `SpeculativeConfig` or its fields (method, model, tree, rule, …);
        None is plain decoding. What is left open goes with the model: the drafter that
        the catalogue has for it, or else "auto", which needs no drafter.
      tokenizer: path or name of one to use instead of the checkpoint's own, of a draft
        model too.
      dtype: of activations ("float32", "bfloat16"); None: float32 on a CPU, where it is
        the quick one, else the checkpoint's own.
      weights: type of the matrices of target and drafter: "float32", "bfloat16",
        "int8", or "int8:128" with a scale per 128 inputs; None: that of `dtype`, but
        int8 where a checkpoint holds it. int8 makes another model of the target, a
        little worse; with or without speculation the text is that model's.
      mesh: of devices that share both models by tensor parallelism, such as "tensor:4"
        or what `sharding.make_mesh` gives; None: one device, or where a loaded model
        lies.
      compilation_cache: folder where compiled programs are kept for other processes;
        True or None: `treespec-jax` under the user's cache directory, which None
        leaves alone if this process has set up or turned off jax's cache; "" or
        False: none. jax has one such cache for a whole process.
      **engine: fields of `EngineSettings` (max_batch, max_len, page_size, num_pages,
        steps_per_dispatch, prefill_chunks, lanes, cache_dtype, record, exact, …).

    Attributes:
      config: of the target.
      tokenizer: of the target, or None.
      dtype: name of the activations' dtype.
      weights: name of the weights' type, see `models.weight_types`.
      drafter: see `drafting.protocol`.
      engine: that runs the requests. While calls may be under way, use it within
        `exclusive` only.
      notes: what of the checkpoints was left out, and what to know of the
        vocabularies of target and drafter, a line each.
      recycle_table: file that `save_recycle_table` writes; None: it has to be named.

    Raises:
      UserError: a checkpoint that cannot be read, vocabularies that differ, a
        malformed tree, a rule that would not be lossless for it, a recycle table that
        does not fit, or sizes that do not; found before weights are read.
    """

    def __init__(
        self,
        model: str | Path | pairs.Model,
        *,
        speculative: SpeculativeConfig | Mapping[str, Any] | None = FITTING,
        tokenizer: str | Path | None = None,
        dtype: str | None = None,
        weights: str | None = None,
        mesh: str | jax.sharding.Mesh | None = None,
        compilation_cache: str | Path | bool | None = None,
        **engine: Any,
    ):
        config = drafters.choose(model, pairs.speculative_config(speculative))
        settings = from_mapping(EngineSettings, engine, "LLM")
        shape = limits.check_speculation(config)
        target, draft = pairs.described(model, tokenizer), None
        if shape.depth:
            limits.check_drafter(config)
            speculation.find(config)
            if config.model is not None:
                draft = pairs.described_draft(target, config, tokenizer)
        left_out = [*target.notes, *(draft.notes if draft is not None else ())]
        self.notes = (*left_out, *check_pair(target, draft))
        self.recycle_table: Path | None = None
        table = None
        if shape.depth and config.recycle_table:
            file = TableFile(config.recycle_table, target)
            self.recycle_table, table = file.path, file.read()
            if table is None:
                note = f"{file.path} is not there yet: nothing to recycle at first"
                self.notes += (note,)
        max_len = limits.text_length(settings.max_len, target, draft)
        limits.check_tree(shape.depth, max_len)

        note = disk_cache.use(compilation_cache)
        self.notes += (note,) if note else ()
        if dtype is None and jax.default_backend() == "cpu":
            dtype = "float32"
        if isinstance(mesh, str):
            mesh = make_mesh(mesh)
        if not isinstance(mesh, jax.sharding.Mesh | None):
            raise UserError(f'mesh must be a text such as "tensor:4", got {mesh!r:.60}')
        weights = limits.check_exact(settings.exact, weights, dtype, mesh)
        target = pairs.loaded(target, dtype, mesh, weights)
        use_huge_pages(target.model)
        if draft is not None:
            draft = pairs.loaded_draft(draft, target, mesh)
            use_huge_pages(draft.model)
        made = speculation.make(
            config,
            draft.model if draft is not None else None,
            draft.tau if draft is not None else None,
        )
        self.config = target.config
        self.tokenizer: Tokenizer | None = target.tokenizer
        self.dtype = str(jnp.dtype(target.dtype))
        self.weights = target.weights
        self.notes += pairs.weight_notes(target)
        self.drafter = made.drafter
        sizes = settings.resolve(max_len, self.dtype)
        costs = None
        if made.asks_costs:
            costs = CostFile.of(target.model, made.drafter, sizes).costs()
        self.engine = Engine(target.model, sizes, made, target.config.eos_ids, costs)
        if isinstance(draft, LoadedDrafter) and config.check_drafter:
            pairs.try_drafter(self.engine, target, draft)
        if table is not None:
            self.engine.begin_with(
                functools.partial(pairs.with_recycle_table, self.drafter, table)
            )
        self._worker = Worker(self.engine)

    def warm_up(self, params: SamplingParams | None = None) -> float:
        """Compiles all that `generate` and `chat` run, before the first request does.

        Nothing needs it: what is not compiled is compiled when it is first used. Calls
        of other threads wait meanwhile. If no text has begun yet, `tree="auto"` also
        runs each shape, for three seconds or one round of all shapes, to learn what a
        step costs on this machine, unless the user's cache folder says so already.

        Args:
          params: settings of requests to come. Most of them are numbers of one
            program. Penalties and bias, bad and allowed words, processors, and
            log-probabilities of several tokens or of prompts take others.

        Returns:
          seconds that it took.
        """
        request = Request([0], self.engine_params(as_params(params)))
        return self._worker.run(functools.partial(warming.warm_up, request=request))

    def reset(self) -> None:
        """Forgets all texts, and what they taught the drafter, as if it were new.

        Raises:
          ValueError: a request of any thread waits or runs.
        """
        self._worker.run(Engine.reset)

    def exclusive(self) -> contextlib.AbstractContextManager[Engine]:
        """Lends the engine to the current thread, while the calls of others wait.

        Example:
          with llm.exclusive() as engine:
              engine.compile()

        Raises:
          ValueError: a request of any thread waits or runs.
        """
        return self._worker.exclusive()

    def run(self, function: Callable[[Engine], Any]) -> Any:
        """Runs a function of the engine between two dispatches; returns its result.

        The calls of others stay where they are meanwhile.
        """
        return self._worker.run(function)

    def post(self, function: Callable[[Engine], Any]) -> None:
        """Does the same soon, and waits for nothing; may be called anywhere."""
        self._worker.post(function)

    def close(self) -> None:
        """Ends all calls, whose callers get a UserError, and the engine's thread.

        A `with LLM(...) as llm:` does it at its end. It need not be called: the thread
        ends with the last reference to the LLM, too, and with the program.
        """
        self._worker.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        max_steps: int | None = None,
        use_tqdm: bool = False,
        on_finish: OnFinish | None = None,
    ) -> Generation:
        """Continues every prompt.

        Args:
          prompts: a text, several texts, or lists of token ids (taken as they are);
            each may be in a dictionary, as vLLM takes it (`arguments.as_prompt`).
          params: one per prompt, or one for all, whose seeds then follow from prompt
            to prompt (`SamplingParams.for_text`); a mapping of its fields is one; None
            is greedy with the defaults.
          max_steps: steps per dispatch at most; with 1 tokens reach the host as soon
            as they are known (`Completion.arrivals`). None: `steps_per_dispatch`.
          use_tqdm: show on stderr how many texts are done, and tokens per second.
          on_finish: gets number and completion of a prompt as soon as it is finished.

        Raises:
          UserError: an empty prompt, one longer than max_len, or text without a
            tokenizer.
        """
        readers = self._readers(prompts, params)
        return self._serve(readers, max_steps, use_tqdm, on_finish)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        max_steps: int | None = None,
    ) -> Generation:
        """Does what `generate` does, for a task of asyncio; may be cancelled."""
        return await self._serve_async(self._readers(prompts, params), max_steps)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        variables: Mapping[str, Any] | None = None,
        max_steps: int | None = None,
        use_tqdm: bool = False,
        on_finish: OnFinish | None = None,
    ) -> Generation:
        """Answers conversations, written out by the checkpoint's chat template.

        Args:
          messages: one conversation, [{"role": "user", "content": "…"}, …], or several.
          params: as for `generate`.
          variables: for the template to see; see `ChatTemplate.render`.
          max_steps: as for `generate`.
          use_tqdm: as for `generate`.
          on_finish: as for `generate`.

        Raises:
          UserError: no chat template, malformed messages, messages that the template
            refuses, or that have no room in max_len.
        """
        readers = self._chat_readers(messages, params, variables)
        return self._serve(readers, max_steps, use_tqdm, on_finish)

    async def achat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        variables: Mapping[str, Any] | None = None,
        max_steps: int | None = None,
    ) -> Generation:
        """Does what `chat` does, for a task of asyncio; may be cancelled."""
        readers = self._chat_readers(messages, params, variables)
        return await self._serve_async(readers, max_steps)

    def _serve(self, readers: list[Reader], max_steps, use_tqdm, on_finish):
        shown = as_bool("use_tqdm", use_tqdm)
        news, ended = shown or on_finish is not None, telling(readers, on_finish)
        call = Call(readers, Bell(), _steps(max_steps), streaming=news)
        try:
            with Progress([reader.request for reader in readers], shown) as progress:
                self._worker.submit(call)
                for index in call.ends(progress.show):
                    ended(index)
        except BaseException:
            # Nothing of an interrupted call stays in the slots.
            call.cancel()
            raise
        return _generation(call)

    async def _serve_async(self, readers, max_steps) -> Generation:
        call = Call(readers, AsyncBell(), _steps(max_steps))
        try:
            self._worker.submit(call)
            await call.wait_async()
        except BaseException:
            call.cancel()
            raise
        return _generation(call)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Continues one prompt and yields its text as it comes.

        Pieces never split a character, and nothing is yielded that may still turn out
        to belong to a stop text. The text goes on whether or not they are taken, until
        the stream is closed or dropped.
        """
        return Stream(
            self._worker,
            self._reader(as_prompt(prompt), single_params(params, "a stream")),
        )

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncStream:
        """Does what `stream` does, for `async for` in a task of asyncio."""
        reader = self._reader(as_prompt(prompt), single_params(params, "a stream"))
        return AsyncStream(self._worker, reader)

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Stream:
        """Answers one conversation as `chat` does, and yields the text as it comes."""
        reader = self._chat_reader(
            check_messages(messages), single_params(params, "a stream"), variables
        )
        return Stream(self._worker, reader)

    def astream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> AsyncStream:
        """Does what `stream_chat` does, for `async for` in a task of asyncio."""
        reader = self._chat_reader(
            check_messages(messages), single_params(params, "a stream"), variables
        )
        return AsyncStream(self._worker, reader)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        **params: Any,
    ) -> Beams:
        """The likeliest texts of every prompt, by `beam_texts.search`.

        `params` are the fields of `BeamParams`: beams, max_tokens, length_penalty, …
        """
        return search(self, prompts, from_mapping(BeamParams, params, "beam_search"))

    def save_recycle_table(self, path: str | Path | None = None) -> Path:
        """Writes what all requests taught methods "recycle" and "auto" to a file.

        A later `LLM` over the same vocabulary begins with it (`recycle_table`). It
        makes no text different, only the first ones faster.

        Args:
          path: of the file, an .npz; None: `SpeculativeConfig.recycle_table`.

        Returns:
          the path.

        Raises:
          UserError: there is nothing of that kind to write, no path, or nowhere to
            write; a file that was there stays as it was.
        """
        table = self._worker.run(
            functools.partial(pairs.recycle_table_of, self.drafter)
        )
        if table is None:
            raise UserError(
                "the drafter recycles nothing that outlives a request; take method "
                "'recycle' or 'auto'"
            )
        path = path or self.recycle_table
        if path is None:
            raise UserError("no file was named for the recycle table; give its path")
        file = TableFile(path, self)
        file.write(table)
        return file.path

    def _readers(self, prompts, params) -> list[Reader]:
        prompts = as_prompts(prompts)
        params = each_params(params, len(prompts), "prompts")
        pairs = zip(prompts, params, strict=True)
        return [self._reader(p, s) for p, some in pairs for s in some.each()]

    def _chat_readers(self, messages, params, variables) -> list[Reader]:
        conversations = check_conversations(messages)
        params = each_params(params, len(conversations), "conversations")
        pairs = zip(conversations, params, strict=True)
        return [
            self._chat_reader(c, s, variables) for c, some in pairs for s in some.each()
        ]

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt; ids are taken as they are.

        Raises:
          UserError: a text, and the checkpoint has no tokenizer.
        """
        return self._tokenizer().encode(prompt) if isinstance(prompt, str) else prompt

    def _reader(self, prompt: str | list[int], params: SamplingParams) -> Reader:
        # A token that begins every text is enough of a prompt.
        ids = self.encode(prompt)
        return self._checked(prompt, ids, params, ids)

    def _chat_reader(self, messages, params, variables) -> Reader:
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

    def engine_params(self, params: SamplingParams) -> SamplingParams:
        """Settings as the engine takes them: bad words as token ids, and a seed.

        Raises:
          UserError: tokens that the model lacks, texts without a tokenizer, settings
            that forbid every token, or a function of logits that fails.
        """
        if params.stop and self.tokenizer is None:
            raise UserError("stop texts need a tokenizer; the checkpoint has none")
        params = with_token_ids(params, self.tokenizer).for_text()
        self.engine.check_params(params)
        return params

    def _checked(self, prompt, ids, params, context) -> Reader:
        limits.check_tokens(ids, self.config.vocab_size)
        request = Request(prompt=ids, params=self.engine_params(params))
        self.engine.check(request)
        return Reader(prompt, request, self.tokenizer, context)


def _steps(max_steps: int | None) -> int | None:
    return None if max_steps is None else as_int("max_steps", max_steps, 1)


def _generation(call: Call) -> Generation:
    """What a call gave, once it has ended; raises what failed."""
    call.check()
    stats = [reader.request.stats for reader in call.readers]
    times = call.prefill_seconds, call.decode_seconds, call.compile_seconds
    return Generation(completions_of(call.readers), total(stats, *times))
