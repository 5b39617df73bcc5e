"""From settings to loaded weights and engines that share them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from treespec_jax import limits
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError
from treespec_jax.experiments.prompts import Prompt
from treespec_jax.experiments.settings import Experiment
from treespec_jax.trees import shapes


@dataclasses.dataclass(frozen=True)
class Pair:
    """A target and, unless decoding is plain, a drafter (`checkpoints.LoadedModel`)."""

    target: object
    draft: object | None


def check(
    settings: Experiment,
    prompts: Iterable[Prompt],
    trees: Iterable[str],
    options: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of the prompts, once all that weights are not needed for is right.

    Takes milliseconds and does not start jax.

    Args:
      settings: with their paths looked up.
      prompts: texts, or conversations.
      trees: shapes that will be grown.
      options: further values for a chat template to see.

    Raises:
      UserError: a checkpoint whose configuration or tokenizer cannot be read, a pair
        of different vocabularies, max_len past the models' positions, a tree that is
        deeper than max_len, no tokenizer, no chat template, a prompt without room in
        max_len, or a logit bias for a token that the target lacks.
    """
    from treespec_jax.checkpoints import describe

    tokenizer = settings.tokenizer or None
    target = describe(settings.target, tokenizer)
    draft = None
    if settings.draft:
        draft = describe(settings.draft, tokenizer)
        limits.check_pair(target, draft)
    max_len = limits.text_length(settings.engine.max_len, target, draft)
    for tree in trees:
        limits.check_tree(shapes.parse(tree).depth, max_len)
    if target.tokenizer is None:
        raise UserError(
            "the target's checkpoint has no tokenizer; name one with --tokenizer=PATH"
        )
    tokenizer = target.tokenizer
    encoded = [
        tokenizer.encode(p) if isinstance(p, str) else tokenizer.encode_chat(p, options)
        for p in prompts
    ]
    limits.check_bias(settings.sampling.logit_bias, target.config.vocab_size)
    for ids in encoded:
        limits.check_tokens(ids, target.config.vocab_size)
        limits.check_prompt(ids, max_len)
    return encoded


def load_pair(settings: Experiment) -> Pair:
    """Reads the weights that `settings` name.

    Raises:
      UserError: a checkpoint that cannot be read, or a mesh that cannot be had.
    """
    import jax

    from treespec_jax.checkpoints import load
    from treespec_jax.sharding import make_mesh

    dtype = settings.dtype or None
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    tokenizer = settings.tokenizer or None
    mesh = make_mesh(settings.mesh) if settings.mesh else None
    target = load(settings.target, dtype, tokenizer=tokenizer, mesh=mesh)
    draft = None
    if settings.draft:
        draft = load(settings.draft, target.dtype, tokenizer=tokenizer, mesh=mesh)
    return Pair(target, draft)


def make_llm(settings: Experiment, pair: Pair, tree: str, record: bool = False):
    """An `LLM` with an engine of its own over the shared weights.

    `record` keeps what became of its trees.

    Raises:
      UserError: vocabularies that differ, or sizes that do not fit.
    """
    from treespec_jax import LLM

    engine = settings.engine
    speculative = None
    if tree != "none":
        speculative = {
            "method": "draft_model",
            "model": pair.draft,
            "tree": tree,
            "tau": settings.tau,
            "rule": settings.rule,
            "proposal": settings.proposal,
            "cascade": settings.cascade,
            "alpha": settings.alpha,
        }
    return LLM(
        pair.target,
        speculative=speculative,
        record=record,
        **{f.name: getattr(engine, f.name) for f in dataclasses.fields(engine)},
    )


def encode(
    llm, prompts: Iterable[str], params: SamplingParams
) -> list[Sequence[int] | str]:
    """Token ids of the prompts, after checking that each can be served.

    Raises:
      UserError: no tokenizer, an empty prompt, or one longer than max_len.
    """
    from treespec_jax.engine.engine import Request

    if llm.tokenizer is None:
        raise UserError(
            "the target's checkpoint has no tokenizer; name one with --tokenizer=PATH"
        )
    encoded = [llm.tokenizer.encode(prompt) for prompt in prompts]
    for ids in encoded:
        llm.engine.check(Request(prompt=ids, params=params))
    return encoded


def seeded(sampling: SamplingParams, count: int) -> list[SamplingParams]:
    """Settings of so many texts to measure: seeds that follow, and no early end."""
    return [
        dataclasses.replace(
            sampling, seed=(sampling.seed + index) % 2**32, ignore_eos=True
        )
        for index in range(count)
    ]


def warm_up(llm, prompts: Iterable[Sequence[int]]) -> None:
    """Compiles all that these prompts will run, on prompts just long enough for it."""
    from treespec_jax.engine.engine import prefill_plan

    config = llm.engine.config
    sizes = {
        size
        for prompt in prompts
        for _, size, _ in prefill_plan(len(prompt) - 1, config.prefill_chunks)
    }
    for size in sorted(sizes):
        length = min(size + 1, config.max_len - 1)
        # Greedy or not is one program.
        params = SamplingParams(max_tokens=1, temperature=1.0, ignore_eos=True)
        llm.generate([[0] * length], params)


def decode(llm, prompts, params, options=None):
    """Generates; returns the `Generation` and seconds of all but prefill.

    By the clock on the wall, so that the host's work between dispatches counts.

    Args:
      llm: an `LLM`.
      prompts: texts and token ids, or conversations.
      params: for all of them, or each.
      options: further values for a chat template to see.
    """
    chat = prompts and prompts[0] and isinstance(prompts[0][0], dict)
    began = time.perf_counter()
    if chat:
        generation = llm.chat(prompts, params, options)
    else:
        generation = llm.generate(prompts, params)
    seconds = time.perf_counter() - began - generation.stats.prefill_seconds
    return generation, seconds
