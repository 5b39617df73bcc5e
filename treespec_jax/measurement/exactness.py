"""Whether speculation changed a text, and how far rounding could.

Speculation gives the tokens of plain decoding as long as a row of the target's pass
gives the same numbers alone and among others. Sums of floats in another order do not,
quite: where two scores are as near as that, either token may be taken (a near tie).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.branch import Branch
from treespec_jax.cache import pages as paging
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine import placement
from treespec_jax.engine import step as stepping
from treespec_jax.engine.executor import TPU_LANES
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.linear import linear
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import CacheView
from treespec_jax.sampling.policy import MIN_TEMPERATURE
from treespec_jax.trees.token_tree import static_tree
from treespec_jax.trees.topology import chain

# Passes of N rows; each but the first has a prefix in the cache.
_BLOCKS = 2
# Rounding may move both scores, by twice as much as the probe's few tokens showed.
_MARGIN = 4
# Nats; what rounding moves scores by in texts much longer than the probe's, of float32,
# of weights of 16 bits, and where activations are rounded to int8.
_TIES = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1, "int8": 0.3}


@dataclasses.dataclass(frozen=True)
class Probe:
    """One row of the target's pass against N.

    Attributes:
      rows: N.
      logits: largest difference of a logit.
      kv: largest difference of a key or value.
      products_equal: whether each kind of weight gives a row the same bits alone and
        among N.
      weights: type of the target's.
      bitwise: one row and N are to give the same bits (`EngineConfig.exact`).
    """

    rows: int
    logits: float
    kv: float
    products_equal: bool
    weights: str = "float32"
    bitwise: bool = False

    def near(self, params: SamplingParams) -> float:
        """Scores that are apart by no more may be ordered either way by rounding."""
        if self.bitwise:
            return 0.0
        greedy = params.temperature < MIN_TEMPERATURE
        scale = 1.0 if greedy else 1 / params.temperature
        least = _TIES[self.weights.partition(":")[0]]
        return max(least, _MARGIN * self.logits) * scale

    def __str__(self) -> str:
        equal = "bit-equal" if self.products_equal else "not bit-equal"
        if not self.logits and not self.kv:
            return (
                f"one row against {self.rows}: logits, keys and values are bit-equal; "
                f"products are {equal}"
            )
        return (
            f"one row against {self.rows}: logits differ by {self.logits:.1e} at most, "
            f"keys and values by {self.kv:.1e}; products are {equal}"
        )


def probe(target: Transformer, config: EngineConfig, rows: int) -> Probe:
    """Runs arbitrary tokens through the target, `rows` at a time and one at a time.

    Args:
      target: the model.
      config: of the engine, for the types and the layout of its cache.
      rows: N, nodes of the tree; at least 2 are compared.
    """
    rows = max(2, rows)
    target = placement.in_arithmetic(target, config.exact)
    tokens = np.random.default_rng(0).integers(
        target.config.vocab_size, size=(_BLOCKS, rows), dtype=np.int32
    )
    logits, kv = _passes(target, config, tokens)
    lone_logits, lone_kv = _passes(target, config, tokens.reshape(-1, 1))
    return Probe(
        rows,
        _apart(logits, lone_logits),
        max(map(_apart, kv, lone_kv)),
        _products_equal(target, rows),
        target.types.weights,
        bool(config.exact),
    )


def _passes(target: Transformer, config: EngineConfig, tokens: np.ndarray):
    """Logits [V, R] and per layer keys and values [1, K, 2, R, H] of a text in blocks.

    Args:
      target: the model.
      config: of the engine.
      tokens: int32 [blocks, T], each block a chain after those before it.
    """
    flat, width = FlatModule(target), tokens.shape[1]
    used = -(-tokens.size // config.page_size)
    tpu = placement.platform(target) == "tpu"
    layout = paging.CacheLayout(
        used + 1,
        config.page_size,
        config.cache_dtype,
        config.lanes or (TPU_LANES if tpu else 1),
        placement.placement(target, None),
    )
    table = jnp.arange(1, used + 1, dtype=jnp.int32)[None]
    path, counts = jnp.arange(width)[None], jnp.full(1, width, jnp.int32)

    @functools.partial(jax.jit, donate_argnums=1)
    def one_pass(leaves, pages, length_1, tokens_1T):
        tree = static_tree(chain(width - 1), tokens_1T, jnp.zeros((1, width)))
        view = CacheView(pages, table, length_1)
        done = stepping.verify(flat.bind(leaves), tree, view)
        destination = paging.Destination(table, length_1, counts)
        after, kv = jnp.max(done.logits) < jnp.inf, done.forward.kv
        return paging.commit(pages, destination, kv, path, after), done.logits, kv

    pages, found = paging.empty_pages(target.config, layout), []
    for number, block in enumerate(tokens):
        start = jnp.full(1, number * width, jnp.int32)
        pages, *new = one_pass(flat.leaves, pages, start, block[None])
        found.append(jax.device_get(new))
    logits, kv = zip(*found, strict=True)
    layers = zip(*kv, strict=True)
    return np.concatenate(logits, 1), [np.concatenate(x, 3) for x in layers]


def _apart(some: np.ndarray, others: np.ndarray) -> float:
    wide = some.astype(np.float32), others.astype(np.float32)
    return float(np.max(np.abs(np.subtract(*wide))))


def _products_equal(target: Transformer, rows: int) -> bool:
    """Of the matrices of the first layer and of the head, on normal activations."""
    cfg, layer = target.config, target.layers[0]
    head = target.embedding if cfg.tied_embeddings else target.head
    product = jax.jit(linear)
    for weight, inputs in (
        (layer.attention.qkv, cfg.embed_dim),
        (layer.attention.out, cfg.num_heads * cfg.head_dim),
        (layer.mlp.gate_up, cfg.embed_dim),
        (layer.mlp.down, cfg.mlp_dim),
        (head, cfg.embed_dim),
    ):
        x_IR = jax.random.normal(jax.random.key(0), (inputs, rows), target.types.dtype)
        together = np.asarray(product(weight[...], x_IR))
        for row in range(rows):
            alone = np.asarray(product(weight[...], x_IR[:, row : row + 1]))
            if (alone[..., 0] != together[..., row]).any():
                return False
    return True


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where a text first differs from plain decoding.

    Attributes:
      prompt: what names it, see `TextPair`.
      position: of the token, from the end of the prompt.
      tree: token with speculation; None: that text ended.
      plain: token of plain decoding; None: that text ended.
      gap: how far the worse of the two is below the best score there: log p of the
        policy plus noise, of greedy text the logits. None: a text ended, or one token
        has no probability.
      near: gaps up to here are near ties, see `Probe.near`.
    """

    prompt: int | str
    position: int
    tree: int | None
    plain: int | None
    gap: float | None
    near: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.gap is not None and 0 < self.near >= self.gap

    def __str__(self) -> str:
        if self.gap is None:
            apart = "whose scores cannot be compared"
        else:
            apart = f"scores {self.gap:.1e} apart"
        kind = "a near tie" if self.is_tie else "NO near tie"
        return (
            f"prompt {self.prompt}, token {self.position} is {self.tree} with the tree "
            f"and {self.plain} without, {apart}: {kind} (up to {self.near:.1e})"
        )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Texts against those of plain decoding.

    Attributes:
      probe: of the target's pass.
      texts: that were compared.
      tokens: that plain decoding emitted.
      equal: of these, before the first difference of each text.
      differences: the first of each text that differs.
    """

    probe: Probe
    texts: int
    tokens: int
    equal: int
    differences: tuple[Difference, ...]

    @property
    def ties(self) -> int:
        """How many of the differences are near ties."""
        return sum(found.is_tie for found in self.differences)

    @property
    def lossless(self) -> bool:
        """Whether nothing differs but near ties, and what followed from them."""
        return all(found.is_tie for found in self.differences)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = dataclasses.asdict(self)
        values |= {"lossless": self.lossless, "near_ties": self.ties}
        pairs = zip(values["differences"], self.differences, strict=True)
        values["differences"] = [d | {"is_tie": one.is_tie} for d, one in pairs]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verdict:
        """What `as_dict` gave."""
        names = [field.name for field in dataclasses.fields(Difference)]
        differences = tuple(
            Difference(**{name: one[name] for name in names})
            for one in values["differences"]
        )
        counts = (values[name] for name in ("texts", "tokens", "equal"))
        return cls(Probe(**values["probe"]), *counts, differences)

    def __str__(self) -> str:
        ties = self.ties
        others = len(self.differences) - ties
        return "\n".join(
            [
                f"Lossless: {self.equal} of {self.tokens} tokens equal plain decoding; "
                f"near ties: {ties}."
                if self.lossless
                else f"NOT LOSSLESS: {others} of the texts differ from plain decoding "
                f"by more than rounding explains; {self.equal} of {self.tokens} tokens "
                f"are equal; near ties: {ties}.",
                *map(str, self.differences),
            ]
        )


@dataclasses.dataclass(frozen=True)
class TextPair:
    """A text, and the one that plain decoding gives.

    Attributes:
      prompt: what names it: the prompt's number, or words.
      prompt_ids: token ids of the prompt.
      tree: those that speculation emitted.
      plain: those of plain decoding.
      params: of both, with the seed of their noise.
    """

    prompt: int | str
    prompt_ids: Sequence[int]
    tree: Sequence[int]
    plain: Sequence[int]
    params: SamplingParams


def pairs(
    completions: Iterable[Any], plain: Iterable[Any], params: Iterable[SamplingParams]
) -> list[TextPair]:
    """The texts of prompts beside those of plain decoding, by their seeds.

    Args:
      completions: with speculation.
      plain: of plain decoding, each with a text for every seed of the other.
      params: of every prompt.
    """
    found = []
    given = zip(completions, plain, params, strict=True)
    for index, (ours, theirs, one) in enumerate(given):
        by_seed = {text.seed: text for text in theirs.texts}
        for number, text in enumerate(ours.texts, 1):
            name = f"{index} [{number}]" if ours.others else index
            other = by_seed[text.seed]
            own = dataclasses.replace(one, seed=text.seed, n=1, best_of=None)
            ids = theirs.prompt_token_ids
            found.append(TextPair(name, ids, text.token_ids, other.token_ids, own))
    return found


def verdict(llm, texts: Iterable[TextPair], probed: Probe) -> Verdict:
    """Compares texts with those of plain decoding.

    Args:
      llm: that decodes plainly; it scores the tokens where texts part.
      texts: in pairs.
      probed: of the same target.
    """
    number, count, equal, differences = 0, 0, 0, []
    for pair in texts:
        number += 1
        count += len(pair.plain)
        position = first_difference(pair.tree, pair.plain)
        if position is None:
            equal += len(pair.plain)
            continue
        equal += position
        tokens = [
            int(x[position]) if position < len(x) else None
            for x in (pair.tree, pair.plain)
        ]
        gap = None if None in tokens else _gap(llm, pair, position, tokens)
        near = probed.near(pair.params)
        differences.append(Difference(pair.prompt, position, *tokens, gap, near))
    return Verdict(probed, number, count, equal, tuple(differences))


def beam_verdict(
    found: Iterable[Sequence[Any]],
    plain: Iterable[Sequence[Any]],
    length_penalty: float,
    probed: Probe,
) -> Verdict:
    """Compares texts of beam search with those of the search without trees, by rank.

    The gap is that of the two texts' scores, each a sum of log p over a power of the
    length; every log p of both may be off. A tie that cut a beam on the way, and so led
    to texts of other scores, is none by these.

    Args:
      found: `BeamTexts` with trees.
      plain: without.
      length_penalty: of both searches.
      probed: of the same target.
    """
    number, count, equal, differences = 0, 0, 0, []
    near = probed.near(SamplingParams())
    for index, (ours, theirs) in enumerate(zip(found, plain, strict=True)):
        for rank, (one, other) in enumerate(
            itertools.zip_longest(ours, theirs, fillvalue=None), 1
        ):
            tree, ids = (text.token_ids if text else [] for text in (one, other))
            number, count = number + 1, count + len(ids)
            position = first_difference(tree, ids)
            equal += len(ids) if position is None else position
            if position is None:
                continue
            tokens = [x[position] if position < len(x) else None for x in (tree, ids)]
            gap = abs(one.score - other.score) if one and other else None
            lengths = [len(x) ** (1 - length_penalty) for x in (tree, ids) if x]
            name = f"{index} [{rank}]"
            differences.append(
                Difference(name, position, *tokens, gap, near * sum(lengths))
            )
    return Verdict(probed, number, count, equal, tuple(differences))


def first_difference(some: Sequence[int], others: Sequence[int]) -> int | None:
    """Index of the first token that differs or that one lacks; None: all are equal."""
    pairs = enumerate(itertools.zip_longest(some, others))
    return next((index for index, (one, other) in pairs if one != other), None)


def _gap(llm, pair: TextPair, position: int, tokens: Sequence[int]) -> float | None:
    """See `Difference.gap`, of the tokens at a position of a plain text."""
    with Branch.create(llm, pair.params) as text:
        text.prefill(list(pair.prompt_ids))
        if position:
            text.commit(list(pair.plain[:position]))
        scores = text.scores()
    gap = float(scores.max() - scores[list(tokens)].min())
    return gap if np.isfinite(gap) else None
