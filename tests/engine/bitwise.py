"""`exact="bitwise"`: logits of the same bits whatever the program, and no tie forgiven.

The logits are those of the engine's own programs: its rule hands them out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.engine.support import serve
from treespec_jax.acceptance.exact import ExactMatch
from treespec_jax.config import EngineConfig, ModelConfig, SamplingParams
from treespec_jax.drafting.draft_model import DraftModel
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.measurement import exactness
from treespec_jax.models.transformer import Transformer
from treespec_jax.speculation import PLAIN, Speculation
from treespec_jax.trees import shapes

TOKENS = 24
# Tree, batch, page size, steps per dispatch, chunks of a prompt.
LAYOUTS = [
    ("none", 5, 16, 4, (4, 16)),
    ("chain:3", 1, 16, 4, (64,)),
    ("dynamic:7@4", 5, 64, 1, (16,)),
    ("dynamic:15@5", 5, 16, 4, (8,)),
    ("dynamic:15@5", 1, 64, 1, (3,)),
]


class Book:
    """Logits by (seed, position) of the token that they are for."""

    def __init__(self):
        self.rows: dict[tuple[int, int], bytes] = {}

    def add(self, logits_VBT, path_BC, count_B, seed_B, first_B):
        for b, first in enumerate(np.asarray(first_B)):
            # An idle slot stands at the beginning of a text.
            for depth in range(count_B[b] + 1 if first > 1 else 0):
                row = np.asarray(logits_VBT[:, b, path_BC[b, depth]]).tobytes()
                key = int(seed_B[b]), int(first) + depth
                assert self.rows.setdefault(key, row) == row, key


@dataclasses.dataclass(frozen=True)
class Recording(ExactMatch):
    """The exact rule, which writes down what it decided by."""

    book: Book = dataclasses.field(default_factory=Book, compare=False)

    def __hash__(self):
        return id(self.book)

    def decide(self, tree, logits_VR, sampling, randomness, max_depth):
        verdict = super().decide(tree, logits_VR, sampling, randomness, max_depth)
        jax.debug.callback(
            self.book.add,
            logits_VR.reshape(-1, *tree.tokens.shape),
            verdict.path,
            verdict.count,
            sampling.seed,
            randomness.noise().first,
        )
        return verdict


def random_pair(config) -> tuple[Transformer, Transformer]:
    """A target in int8, and its first layer, which is right now and then."""
    target = Transformer(config, weights="int8", rngs=nnx.Rngs(0))
    target.norm.scale[...] = target.norm.scale[...] + 2.0
    changes = dict(num_layers=1, window=None, local_layers=())
    draft = Transformer(
        dataclasses.replace(config, **changes), weights="int8", rngs=nnx.Rngs(1)
    )
    for ours, theirs in (
        (draft.embedding, target.embedding),
        (draft.head, target.head),
        (draft.norm.scale, target.norm.scale),
    ):
        ours.set_value(theirs.get_value())
    nnx.update(draft.layers[0], nnx.state(target.layers[0]))
    return target, draft


def build(pair, layout, exact="bitwise") -> tuple[Engine, Book]:
    tree, batch, page, steps, chunks = layout
    target, draft = pair
    rule, shape = Recording(), shapes.parse(tree)
    speculation = dataclasses.replace(PLAIN, rule=rule)
    if shape.depth:
        speculation = Speculation(DraftModel(draft, 0.5), (shape,), rule)
    config = EngineConfig(
        max_batch=batch,
        max_len=128,
        page_size=page,
        steps_per_dispatch=steps,
        prefill_chunks=chunks,
        cache_dtype="int8",
        exact=exact,
    )
    return Engine(target, config, speculation, ()), rule.book


def run(engine, prompts) -> list[Request]:
    """Every prompt greedily and at temperature 1, with a seed of its own."""
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    requests = [
        Request(prompt, dataclasses.replace(params, temperature=t, seed=2 * i + int(t)))
        for i, prompt in enumerate(prompts)
        for t in (0.0, 1.0)
    ]
    serve(engine, requests)
    jax.effects_barrier()
    return requests


class BitwiseContract:
    """A subclass has `config`, of the models."""

    config: ModelConfig

    @pytest.fixture(scope="class")
    def pair(self, optimised_programs):
        """Bits differ in vectorised code, of which most tests' programs have none."""
        return random_pair(self.config)

    @pytest.fixture(scope="class")
    def prompts(self):
        rng = np.random.default_rng(0)
        return [rng.integers(3, 97, n).tolist() for n in (2, 17, 40)]

    @pytest.fixture(scope="class")
    def plain(self, pair, prompts):
        engine, book = build(pair, ("none", 1, 64, 1, (16,)))
        requests = run(engine, prompts)
        assert len(book.rows) == len(requests) * TOKENS
        return [r.tokens for r in requests], book.rows

    @pytest.fixture(scope="class")
    def unused(self, pair):
        """Gives engines of layouts, compiled once, that know no text."""
        made = {}

        def give(layout):
            if layout not in made:
                made[layout] = build(pair, layout)
            engine, book = made[layout]
            engine.reset()
            book.rows.clear()
            return engine, book

        return give

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_logits_and_tokens_are_those_of_plain_decoding(
        self, layout, unused, plain, prompts
    ):
        engine, book = unused(layout)
        requests = run(engine, prompts)
        tokens, rows = plain
        wrong = [key for key, row in rows.items() if book.rows[key] != row]
        assert not wrong
        assert [r.tokens for r in requests] == tokens
        steps = sum(r.stats.steps for r in requests)
        if layout[0] != "none":
            assert len(requests) * TOKENS / steps > 1.2, "never right: a dead test"
        # Again: pages of what was written are found now, by other slots.
        longest = prompts[2] + tokens[4]
        again = Request(longest, SamplingParams(max_tokens=1, ignore_eos=True))
        serve(engine, [again])
        assert again.stats.shared_pages == (len(longest) - 1) // engine.config.page_size

    def test_a_text_taken_in_has_the_rows_of_one_written(self, unused, plain, prompts):
        """Later logits read what prefill wrote, in place of what steps committed."""
        tokens, rows = plain
        taken = TOKENS - 5
        for layout in LAYOUTS:
            engine, book = unused(layout)
            params = SamplingParams(max_tokens=5, ignore_eos=True)
            texts = [p for p in prompts for _ in range(2)]
            requests = [
                Request(
                    text + tokens[i][:taken],
                    dataclasses.replace(params, temperature=float(i % 2), seed=i),
                )
                for i, text in enumerate(texts)
            ]
            serve(engine, requests)
            jax.effects_barrier()
            assert [r.tokens for r in requests] == [t[taken:] for t in tokens]
            keys = [k for k in rows if k[1] >= len(texts[k[0]]) + taken]
            assert len(keys) == 5 * len(texts)
            assert all(book.rows[key] == rows[key] for key in keys)

    def test_the_probe_says_so(self, pair):
        config = EngineConfig(max_batch=1, max_len=64, page_size=16, cache_dtype="int8")
        found = exactness.probe(
            pair[0], dataclasses.replace(config, exact="bitwise"), rows=16
        )
        assert (found.logits, found.kv, found.products_equal) == (0, 0, True)
        assert found.near(SamplingParams(temperature=0.5)) == 0
        assert str(found) == (
            "one row against 16: logits, keys and values are bit-equal; products are "
            "bit-equal"
        )

    def test_parameters_are_shared(self, pair):
        from treespec_jax.models.arithmetic import bitwise

        theirs, ours = (
            jax.tree.leaves(nnx.state(m)) for m in (pair[0], bitwise(pair[0]))
        )
        assert all(a is b for a, b in zip(theirs, ours, strict=True))
        tokens, positions = jnp.zeros((1, 4), jnp.int32), jnp.arange(4)[None]
        mask = jnp.tril(jnp.ones((1, 4, 4), bool))
        about, near = (
            m.logits(m(tokens, positions, mask).hidden)
            for m in (pair[0], bitwise(pair[0]))
        )
        scale = float(jnp.abs(about).max())
        assert 0 < float(jnp.abs(about - near).max()) < 0.15 * scale
