"""Beam search for users: prompts in, their likeliest texts out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Protocol

from treespec_jax import limits
from treespec_jax.arguments import as_prompts
from treespec_jax.checkpoints.tokenizers import TextStream, Tokenizer
from treespec_jax.completions import Prompt
from treespec_jax.config import ModelConfig, SamplingParams
from treespec_jax.engine.beam_group import Found
from treespec_jax.engine.beams import BeamParams
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.engine.stats import Stats, total


@dataclasses.dataclass(frozen=True)
class BeamText:
    """A text that beam search found.

    Attributes:
      token_ids: an end token included.
      text: that they stand for; "" without a tokenizer.
      score: sum of natural log p under the target, over length ** length_penalty.
      finish_reason: "stop" (it ended) or "length".
    """

    token_ids: list[int]
    text: str
    score: float
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class BeamTexts(Sequence):
    """The best texts of a prompt.

    Attributes:
      prompt: as given.
      texts: best first.
      stats: of its search; steps are passes of the target over all of its beams, and
        tokens are levels, by which every beam grew.
    """

    prompt: str | list[int]
    texts: list[BeamText]
    stats: Stats

    def __getitem__(self, index):
        return self.texts[index]

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass(frozen=True)
class Beams(Sequence):
    """What a search gave, in the order of the prompts.

    Attributes:
      found: per prompt.
      stats: summed; times are wall times.
    """

    found: list[BeamTexts]
    stats: Stats

    def __getitem__(self, index):
        return self.found[index]

    def __len__(self) -> int:
        return len(self.found)


class Host(Protocol):
    """What a search needs of an `LLM`; see there."""

    config: ModelConfig
    tokenizer: Tokenizer | None

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt."""

    def exclusive(self) -> contextlib.AbstractContextManager[Engine]:
        """Lends the engine."""


def search(llm: Host, prompts: Prompt | Sequence[Prompt], params: BeamParams) -> Beams:
    """Exact beam search, quicker by drafted trees.

    Every beam has a draft tree, and the target verifies all of them in one pass. The
    texts are those of beam search without drafting, and of Hugging Face's with the same
    settings. Each beam takes a slot: `max_batch` // beams prompts are searched at once.

    Args:
      llm: whose engine it takes for itself.
      prompts: a text, several texts, or lists of token ids.
      params: how to search.

    Raises:
      UserError: more beams than max_batch, too few pages, or a prompt that cannot run.
      ValueError: a request of any thread waits or runs.
    """
    prompts = as_prompts(prompts)
    requests = []
    for prompt in prompts:
        ids = llm.encode(prompt)
        limits.check_tokens(ids, llm.config.vocab_size)
        requests.append(Request(ids, SamplingParams(max_tokens=params.max_tokens)))
    found: list[Found] = []
    with llm.exclusive() as engine:
        for request in requests:
            engine.check(request)
        prefill, compiling = engine.prefill_seconds, engine.compile_seconds
        size, decoding = max(1, engine.config.max_batch // params.beams), 0.0
        for first in range(0, len(requests), size):
            group = engine.search(requests[first : first + size], params)
            # The last to end saw all passes of its group.
            decoding += max(one.request.stats.decode_seconds for one in group)
            found += group
        prefill = engine.prefill_seconds - prefill
        compiling = engine.compile_seconds - compiling
    given = zip(prompts, found, strict=True)
    texts = [_texts(llm, prompt, one, params.n_best) for prompt, one in given]
    return Beams(
        texts, total([one.stats for one in texts], prefill, decoding, compiling)
    )


def _texts(llm: Host, prompt, found: Found, count: int) -> BeamTexts:
    texts = []
    for hypothesis in found.hypotheses[:count]:
        tokens, text = list(hypothesis.tokens), ""
        if llm.tokenizer is not None:
            stream = TextStream(llm.tokenizer, found.request.prompt)
            text = stream.push(tokens) + stream.flush()
        reason = "stop" if tokens[-1] in llm.config.eos_ids else "length"
        texts.append(BeamText(tokens, text, hypothesis.score, reason))
    return BeamTexts(prompt, texts, found.request.stats)
