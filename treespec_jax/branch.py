"""A generation that can be forked, explored and pruned: `Branch`.

  root = Branch.create(llm, SamplingParams(temperature=0.7, seed=1))
  root.prefill("once upon a time")
  with root.fork() as other:
      other.reseed(2)
      for _ in range(20):
          found = other.produce()
          if found.is_stop:
              break
          other.commit(found.token)
      print(other.text, other.logprob)
  root.prune()

A fork copies no more than one page of the cache, whatever its length. A loop over
`produce` and `commit` says what `LLM.generate` says with the same parameters.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from treespec_jax import limits
from treespec_jax.arguments import as_prompt, single_params
from treespec_jax.checkpoints.tokenizers import TextStream
from treespec_jax.checks import as_int
from treespec_jax.completions import Prompt
from treespec_jax.config import SamplingParams
from treespec_jax.engine.branching import Addition, CachedText, CachedTexts, log_prob
from treespec_jax.engine.engine import Engine
from treespec_jax.errors import UserError
from treespec_jax.llm import LLM
from treespec_jax.stops import StoppedText

# In nats.
_UNITS = {"nats": 1.0, "bits": math.log(2)}


@dataclasses.dataclass(frozen=True)
class Produced:
    """A token that a branch would go on with.

    Attributes:
      token: its id.
      text: that it adds; "" while a character is incomplete, or without a tokenizer.
      logprob: natural log p of it under the target, before penalties, bias,
        temperature and truncation.
      is_stop: whether it ends the text: an end-of-text token, one of
        `stop_token_ids`, or one that completes a stop text.
    """

    token: int
    text: str
    logprob: float
    is_stop: bool


class Branch:
    """One way that a text may go on. Make the first one with `create`.

    Attributes:
      params: how it samples; `max_tokens` is the caller's business.

    Raises:
      UserError: from every method but `prune`, once it is pruned; and where a text is
        longer than max_len, or too few pages are free, with nothing changed.
    """

    def __init__(self, llm: LLM, params: SamplingParams, text: CachedText):
        self._llm, self._cached = llm, text
        self.params = params
        self._prompt = 0
        self._logprob = 0.0

    @classmethod
    def create(cls, llm: LLM, params: SamplingParams | None = None) -> Branch:
        """A branch without a token.

        Args:
          llm: whose target it is, and whose pages it takes.
          params: as for `LLM.generate`.
        """
        params = llm.engine_params(single_params(params, "a branch"))
        return cls(llm, params, _with_texts(llm, CachedTexts.create))

    def prefill(self, prompt: Prompt) -> Branch:
        """Takes in a prompt, a text or token ids; shares pages of a known beginning.

        Returns:
          the branch.

        Raises:
          UserError: it has tokens already, or the prompt is empty.
        """
        text = self._open()
        if text.tokens:
            raise UserError(
                f"the branch has {len(text.tokens)} tokens already; commit the others"
            )
        ids = self._llm.encode(as_prompt(prompt))
        limits.check_tokens(ids, self._llm.config.vocab_size)
        if not ids:
            raise UserError("the prompt is empty; give at least one token")
        additions = [Addition(text, ids, scored=False)]
        _with_texts(self._llm, lambda texts: texts.extend(additions))
        self._prompt = len(ids)
        return self

    def fork(self) -> Branch:
        """A branch of the same tokens, settings and seed, on the same pages."""
        text = self._open()
        its = _with_texts(self._llm, lambda texts: texts.fork(text))
        fork = copy.copy(self)
        fork._cached = its
        return fork

    def reseed(self, seed: int) -> None:
        """Samples with another seed from here on."""
        self._open()
        self.params = dataclasses.replace(self.params, seed=seed).for_text()

    def produce(self) -> Produced:
        """Samples the next token, and changes nothing.

        The noise depends on seed and position alone: the same token comes again until
        something is committed or the branch is reseeded.
        """
        logits, tokens = self.logits, self._cached.tokens
        token = int(self.scores().argmax())
        added = ""
        if self._llm.tokenizer is not None:
            added = TextStream(self._llm.tokenizer, tokens).push([token])
        return Produced(token, added, log_prob(logits, token), self._stops(token))

    def scores(self) -> np.ndarray:
        """float32 [V]: what `produce` takes the best token by.

        The logits after penalties, bias, temperature and truncation (-inf where they
        forbid a token), plus the noise of the position; of greedy text no noise, and
        the logits undivided.
        """
        given = self._begun().tokens, self._prompt, self.logits, self.params
        return self._llm.run(lambda engine: engine.scores(*given))

    def commit(self, tokens: int | Sequence[int]) -> None:
        """Goes on by a token, or by several in one pass of the target."""
        Branch.commit_all([(self, tokens)])

    @staticmethod
    def commit_all(pairs: Iterable[tuple[Branch, int | Sequence[int]]]) -> None:
        """Lets branches of one `LLM` go on, each by its tokens, in one pass together.

        Raises:
          UserError: as for `Branch`; also a branch that comes twice, that has no
            prompt, or that is of another `LLM`.
        """
        pairs = [(branch, _token_list(tokens)) for branch, tokens in pairs]
        if not pairs:
            return
        llm = pairs[0][0]._llm
        if len({id(branch) for branch, _ in pairs}) < len(pairs):
            raise UserError("a branch comes twice; give all of its tokens at once")
        for branch, tokens in pairs:
            if branch._llm is not llm:
                raise UserError("branches of two LLMs cannot be committed together")
            branch._begun()
            limits.check_tokens(tokens, llm.config.vocab_size)
        additions = [Addition(branch._cached, tokens) for branch, tokens in pairs]
        gained = _with_texts(llm, lambda texts: texts.extend(additions))
        for (branch, _), log_probs in zip(pairs, gained, strict=True):
            branch._logprob += float(np.sum(log_probs, dtype=np.float64))

    @property
    def logits(self) -> np.ndarray:
        """float32 [V], the target's after the last token; read only."""
        logits = self._begun().logits.view()
        logits.flags.writeable = False
        return logits

    def entropy(self, unit: str = "nats") -> float:
        """Of the target's distribution after the last token, at temperature 1.

        Args:
          unit: "nats" or "bits".
        """
        if unit not in _UNITS:
            raise UserError(
                f"unit {unit!r} is unknown; choose from {', '.join(_UNITS)}"
            )
        logits = self.logits.astype(np.float64)
        shifted = logits - logits.max()
        weights = np.exp(shifted)
        total = weights.sum()
        # What has no weight adds nothing, though its logarithm is none.
        some = weights > 0
        energy = np.sum(weights[some] * shifted[some]) / total
        return float(np.log(total) - energy) / _UNITS[unit]

    @property
    def logprob(self) -> float:
        """Natural log p of what was committed after the prompt, summed."""
        self._open()
        return self._logprob

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens, the prompt's first."""
        return tuple(self._open().tokens)

    @property
    def position(self) -> int:
        """Tokens so far; the absolute position of the next one."""
        return len(self._open().tokens)

    @property
    def text(self) -> str:
        """What follows the prompt; "" without a tokenizer."""
        tokens = self._open().tokens
        if self._llm.tokenizer is None:
            return ""
        stream = TextStream(self._llm.tokenizer, tokens[: self._prompt])
        return stream.push(tokens[self._prompt :]) + stream.flush()

    @property
    def shared_pages(self) -> int:
        """Pages of the prompt that were in the cache already."""
        return self._open().shared_pages

    @property
    def pruned(self) -> bool:
        """Whether it was pruned, or merged into another branch."""
        return not self._cached.open

    def prune(self) -> None:
        """Frees its pages; a branch that is pruned already stays so.

        Parents may go before their forks.
        """
        _with_texts(self._llm, lambda texts: texts.release(self._cached))

    def merge_into(self, parent: Branch) -> None:
        """Lets another branch go on as this one does, which is pruned.

        Nothing is computed. The parent keeps its own parameters.

        Raises:
          UserError: the parent's tokens are not the beginning of this one's.
        """
        mine, its = self._begun(), parent._open()
        if parent is self or parent._llm is not self._llm:
            raise UserError("a branch is merged into another one of the same LLM")
        if mine.tokens[: len(its.tokens)] != its.tokens:
            raise UserError(
                "the parent has gone another way since the fork; merge into a branch "
                "whose tokens this one begins with"
            )
        _with_texts(self._llm, lambda texts: texts.replace(its, mine))
        parent._logprob = self._logprob
        parent._prompt = self._prompt

    def __enter__(self) -> Branch:
        self._open()
        return self

    def __exit__(self, *_) -> None:
        self.prune()

    def __del__(self):
        text = self._cached
        if text.open:
            self._llm.post(lambda engine: _release(engine, text))

    def _open(self) -> CachedText:
        if self.pruned:
            raise UserError("the branch was pruned; fork one that is alive")
        return self._cached

    def _begun(self) -> CachedText:
        text = self._open()
        if not text.tokens:
            raise UserError("the branch has no token yet; prefill a prompt")
        return text

    def _stops(self, token: int) -> bool:
        params = self.params
        ends = () if params.ignore_eos else self._llm.config.eos_ids
        tokens, prompt = self._cached.tokens, self._prompt
        if token in ends or token in params.stop_token_ids:
            return len(tokens) - prompt >= params.min_tokens
        if not params.stop:
            return False
        text = StoppedText(self._llm.tokenizer, tokens[:prompt], params.stop)
        for number, emitted in enumerate((*tokens[prompt:], token), 1):
            text.push(emitted, early=number <= params.min_tokens)
        return text.stopped


def _with_texts(llm: LLM, function: Callable[[CachedTexts], Any]) -> Any:
    """Runs a function of the cached texts in the engine's thread."""

    def run(engine: Engine) -> Any:
        with engine.cached_texts() as texts:
            return function(texts)

    return llm.run(run)


def _release(engine: Engine, text: CachedText) -> None:
    with engine.cached_texts() as texts:
        texts.release(text)


def _token_list(tokens: int | Sequence[int]) -> list[int]:
    """Tokens to commit, one or several."""
    if isinstance(tokens, (Sequence, np.ndarray)) and not isinstance(tokens, str):
        ids = [as_int("a token to commit", token, 0) for token in tokens]
        if not ids:
            raise UserError("nothing to commit; give at least one token")
        return ids
    return [as_int("a token to commit", tokens, 0)]
