"""What every drafter must hold, whatever it drafts from.

Subclass `DrafterContract` in a test file and give it a `drafter` and the greedy text
that it is asked about.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import TINY
from treespec_jax.cache.pages import CacheLayout
from treespec_jax.drafting.protocol import (
    Committed,
    DraftContext,
    Sizes,
    Successors,
)
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.randomness import Randomness
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import TreeShape

B, PAGE, MAX_LEN = 3, 16, 64
SHAPES = ("chain:3", "regular:2x2x1", "dynamic:5@3", "allotted:5@3")
LAYOUT = CacheLayout(1 + B * MAX_LEN // PAGE, PAGE)
TABLE = np.arange(1, LAYOUT.num_pages, dtype=np.int32).reshape(B, -1)


def sampling(temperature: float = 0.0) -> Sampling:
    zeros = jnp.zeros(B, jnp.int32)
    return Sampling(
        jnp.full(B, temperature, jnp.float32),
        zeros,
        jnp.ones(B),
        jnp.zeros(B),
        jnp.arange(B, dtype=jnp.uint32),
    )


def successors(tokens, real, newest) -> Successors:
    """As of a target that names the numbers after a token."""
    best = (tokens[:, :, None] + np.arange(1, 8)) % TINY.vocab_size
    logits = np.broadcast_to(-np.arange(7, dtype=np.float32), best.shape)
    path = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return Successors(tokens, real, best.astype(np.int32), logits, newest, path)


def chunk(slot: int, text, start: int, end: int) -> Committed:
    """Tokens start..end - 1 of a text, which has one more."""
    row = np.zeros((1, 8), np.int32)
    tokens, following = row.copy(), row.copy()
    tokens[0, : end - start] = text[start:end]
    following[0, : end - start] = text[start + 1 : end + 1]
    return Committed(
        slot=np.int32(slot),
        tokens=tokens,
        following=following,
        root=np.array([text[end]], np.int32),
        start=np.array([start], np.int32),
        count=np.array([end - start], np.int32),
        features=(),
        page_table=TABLE[slot : slot + 1],
        successors=successors(
            tokens,
            np.arange(tokens.shape[1])[None] < end - start,
            np.array([max(end - start - 1, 0)], np.int32),
        ),
    )


def stepped(texts, lengths, counts) -> Committed:
    """A step in which slots emit some tokens of their texts, 4 at most."""
    tokens, following = np.zeros((2, B, 4), np.int32)
    root = np.zeros(B, np.int32)
    for slot, (text, length, count) in enumerate(
        zip(texts, lengths, counts, strict=True)
    ):
        tokens[slot, :count] = text[length : length + count]
        following[slot, :count] = text[length + 1 : length + count + 1]
        root[slot] = text[length + count]
    return Committed(
        slot=None,
        tokens=tokens,
        following=following,
        root=root,
        start=np.where(np.array(counts) > 0, lengths, 0).astype(np.int32),
        count=np.array(counts, np.int32),
        features=(),
        page_table=TABLE,
        successors=successors(
            tokens,
            np.arange(4) < np.array(counts)[:, None],
            np.maximum(np.array(counts, np.int32) - 1, 0),
        ),
    )


class DrafterContract:
    """Trees, and a state that follows the text however it arrives."""

    # Shapes that it can be asked for.
    shapes: tuple[str, ...] = SHAPES

    @pytest.fixture(scope="class")
    def drafter(self):
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def texts(self) -> list[list[int]]:
        rng = np.random.default_rng(5)
        motif = rng.integers(3, 97, 7)
        texts = [np.tile(motif, 5), rng.integers(3, 97, 35), np.tile(motif[::-1], 5)]
        return [text.tolist() for text in texts]

    @pytest.fixture(scope="class")
    def empty(self, drafter):
        return drafter.init(Sizes(B, MAX_LEN, 3, LAYOUT, TINY.vocab_size, 4))

    @pytest.fixture(scope="class")
    def ingest(self, drafter):
        def ingested(state, slot, arrays):
            found = Successors(**arrays.pop("successors"))
            if not drafter.needs.successors:
                found = None
            committed = Committed(slot, features=(), successors=found, **arrays)
            return drafter.ingest(state, committed)

        by_step = jax.jit(lambda state, arrays: ingested(state, None, dict(arrays)))
        by_chunk = jax.jit(lambda state, s, arrays: ingested(state, s, dict(arrays)))

        def run(state, committed):
            arrays = {
                f.name: getattr(committed, f.name)
                for f in dataclasses.fields(committed)
                if f.name not in ("slot", "features")
            }
            arrays["successors"] = vars(committed.successors)
            if committed.slot is None:
                return by_step(state, arrays)
            return by_chunk(state, committed.slot, arrays)

        return run

    @pytest.fixture(scope="class")
    def propose(self, drafter):
        """Trees of all slots, and the state after them."""
        compiled = {}

        def program(shape: TreeShape, proposal: str):
            @jax.jit
            def run(state, root, lengths, active, settings):
                held = jnp.where(active, lengths, 0)
                context = DraftContext(
                    target=None,
                    vocab=TINY.vocab_size,
                    active=active,
                    root=root,
                    lengths=held,
                    page_table=jnp.asarray(TABLE),
                    sampling=settings,
                    randomness=Randomness(
                        settings, held, shape.num_nodes, shape.depth, TINY.vocab_size
                    ),
                    proposal=proposal,
                )
                return drafter.propose(state, shape, context)

            return run

        def call(state, texts, lengths, name, active=(True,) * B, temperature=0.0):
            shape = shapes.parse(name)
            proposal = "sampled" if name.startswith("allotted") else "shared"
            key = name, proposal
            compiled[key] = compiled.get(key) or program(shape, proposal)
            root = np.array([t[n] for t, n in zip(texts, lengths, strict=True)])
            return compiled[key](
                state,
                root.astype(np.int32),
                np.array(lengths, np.int32),
                np.array(active),
                sampling(temperature),
            )

        return call

    @pytest.fixture(scope="class")
    def filled(self, empty, ingest, texts):
        """Each slot has its text's first 20 tokens, in chunks of 8 at most."""
        state = empty
        for slot, text in enumerate(texts):
            for start, end in ((0, 8), (8, 16), (16, 20)):
                state = ingest(state, chunk(slot, text, start, end))
        return state

    def test_trees_have_their_shape(self, drafter, filled, propose, texts):
        """Parents before children, at the depth above, the root's token first."""
        for name in self.shapes:
            shape = shapes.parse(name)
            for temperature in (0.0, 1.0):
                tree, _ = propose(
                    filled, texts, [20] * B, name, temperature=temperature
                )
                tree = jax.tree.map(np.asarray, tree)
                assert tree.tokens.shape == (B, shape.num_nodes)
                assert tree.tokens[:, 0].tolist() == [text[20] for text in texts]
                assert ((tree.tokens >= 0) & (tree.tokens < TINY.vocab_size)).all()
                node_T = np.arange(shape.num_nodes)
                assert (tree.parents[:, 1:] < node_T[1:]).all()
                above = np.take_along_axis(tree.depth, tree.parents, axis=1)
                assert (tree.depth[:, 1:] == above[:, 1:] + 1).all()
                assert tree.depth.max() <= shape.depth and tree.valid[:, 0].all()
                sampled = name.startswith("allotted")
                assert (tree.proposal is not None) == sampled
                for slot in range(B):
                    self.check_families(tree, slot, sampled)
                if tree.source is not None:
                    known = range(len(drafter.sources) or 1)
                    assert set(tree.source[tree.valid].tolist()) <= set(known)

    def check_families(self, tree, slot, sampled: bool) -> None:
        """Siblings differ, and the likelier ones come first unless they were sampled.

        Nothing is below a node that does not exist.
        """
        valid, parents = tree.valid[slot], tree.parents[slot]
        for parent in np.unique(parents):
            family = np.flatnonzero((parents == parent) & valid)
            family = family[family > 0]
            assert valid[parent] or not len(family)
            tokens, log_prob = (
                tree.tokens[slot, family],
                tree.draft_logprob[slot, family],
            )
            assert len(set(tokens.tolist())) == len(family)
            if not sampled:
                assert (np.diff(log_prob) <= 1e-6).all()
                assert np.exp(log_prob).sum() <= 1 + 1e-4

    def forget(self, state):
        """The state without what was measured of how guesses came true.

        Rates are of all slots, and weigh how a text arrived.
        """
        return state

    def same(self, one, other) -> None:
        for name in ("tokens", "parents", "valid"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_allclose(
            one.draft_logprob, other.draft_logprob, atol=1e-4, rtol=1e-4
        )

    def test_a_text_may_arrive_in_any_pieces(self, filled, ingest, propose, texts):
        """By steps of one to four tokens, plain ones too, as by chunks of a prompt."""
        name = self.shapes[0]
        state, lengths = filled, [20] * B
        for counts in ((2, 1, 3), (1, 4, 2), (1, 1, 1), (4, 2, 2)):
            grown = "none" if max(counts) == 1 else name
            _, state = propose(state, texts, lengths, grown)
            state = ingest(state, stepped(texts, lengths, counts))
            lengths = [n + c for n, c in zip(lengths, counts, strict=True)]
        assert lengths == [28] * B
        whole = filled
        for slot, text in enumerate(texts):
            whole = ingest(whole, chunk(slot, text, 20, 28))
        one, _ = propose(self.forget(state), texts, lengths, name)
        other, _ = propose(self.forget(whole), texts, lengths, name)
        self.same(one, other)

    def test_an_idle_slot_keeps_its_state(self, filled, ingest, propose, texts):
        """Its trees after a pause are those without one."""
        name = self.shapes[0]
        _, state = propose(filled, texts, [20] * B, name)
        state = ingest(state, stepped(texts, [20] * B, [3, 2, 4]))
        paused = state
        for length, count in ((22, 2), (24, 1)):
            lengths = [23, length, 24]
            _, paused = propose(
                paused, texts, lengths, name, active=(False, True, False)
            )
            paused = ingest(paused, stepped(texts, lengths, [0, count, 0]))
        one, _ = propose(self.forget(state), texts, [23, 22, 24], name)
        other, _ = propose(self.forget(paused), texts, [23, 25, 24], name)
        for slot in (0, 2):
            self.same(
                *(
                    jax.tree.map(
                        lambda x, slot=slot: np.asarray(x)[slot],
                        dataclasses.replace(tree, proposal=None),
                    )
                    for tree in (one, other)
                )
            )

    def test_a_new_text_forgets_the_old_one(self, filled, ingest, propose, texts):
        """However many of its tokens the drafter had still to take in."""
        name = self.shapes[0]
        stepped_on = ingest(filled, stepped(texts, [20] * B, [4, 0, 3]))
        state = ingest(stepped_on, chunk(0, texts[1], 0, 8))
        fresh = ingest(stepped_on, chunk(1, texts[1], 0, 8))
        lengths = [8, 20, 20]
        one, _ = propose(state, [texts[1], texts[1], texts[2]], lengths, name)
        two, _ = propose(fresh, [texts[0], texts[1], texts[2]], [20, 8, 20], name)
        np.testing.assert_array_equal(one.tokens[0], two.tokens[1])

    def test_a_copied_slot_proposes_like_its_source(
        self, drafter, filled, propose, texts
    ):
        """Of pages that hold the same rows."""
        name = self.shapes[0]
        copied = drafter.copy_slot(filled, jnp.int32(2), jnp.int32(0))
        for page in range(TABLE.shape[1]):
            copied = self.copy_page(copied, TABLE[2, page], TABLE[0, page])
        one, _ = propose(filled, texts, [20] * B, name)
        two, _ = propose(copied, [texts[2], *texts[1:]], [20] * B, name)
        np.testing.assert_array_equal(two.tokens[0], one.tokens[2])
        np.testing.assert_array_equal(two.tokens[1:], one.tokens[1:])

    def copy_page(self, state, source, destination):
        """The state with a page of its cache copied, where it has one."""
        pages = getattr(state, "pages", None)
        if pages is None:
            return state
        pages = jax.tree.map(lambda x: x.at[destination].set(x[source]), pages)
        return dataclasses.replace(state, pages=pages)
