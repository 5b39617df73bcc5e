"""Earlier matches on the device, against lists and loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.drafting import lookup
from treespec_jax import speculation
from treespec_jax.cache.pages import CacheLayout
from treespec_jax.config import SpeculativeConfig
from treespec_jax.drafting import matches
from treespec_jax.drafting.matches import NOBODY, Matches, Texts
from treespec_jax.drafting.ngram import MATCHES
from treespec_jax.drafting.protocol import Committed, DraftContext, Sizes
from treespec_jax.errors import UserError
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.randomness import Randomness
from treespec_jax.trees import shapes

# Slots, tokens of a text, of a chunk, levels of a tree, and tokens of the vocabulary.
B, MAX_LEN, CHUNK, C, V = 3, 30, 8, 3, 4
LAYOUT = CacheLayout(2, 16)


def sizes(max_len: int = MAX_LEN, batch: int = B) -> Sizes:
    return Sizes(batch, max_len, C, LAYOUT, V, C + 1)


class Feeder:
    """Brings tokens to a state on the device and to a model of it alike.

    Args:
      state: of anything that takes in `Committed`.
      corpora: of the model.
      ingest: jitted, of the state, a slot or None, and arrays.
    """

    def __init__(self, state, corpora: lookup.Corpora, ingest):
        self.state, self.corpora, self._ingest = state, corpora, ingest
        self.ready = [False] * len(corpora.texts)

    def room(self, slot: int) -> int:
        """Tokens that a slot may still emit."""
        return MAX_LEN - len(self.corpora.texts[slot])

    def begin(self, slot: int, prompt, pieces, aborted: bool = False) -> None:
        """A new text, in pieces of some sizes; without the last one if aborted."""
        self.corpora.begin(slot)
        start, pieces = 0, iter(pieces)
        while start < len(prompt) - 1 or start == 0:
            end = min(start + next(pieces), len(prompt) - 1)
            if aborted and end == len(prompt) - 1 and start:
                break
            self._commit(slot, [prompt[: end + 1]], [start], [end - start], CHUNK)
            self.corpora.extend(slot, prompt[start + (start > 0) : end + 1])
            start = end
            if len(prompt) == 1:
                break
        self.ready[slot] = not aborted

    def step(self, emitted: dict[int, list[int]]) -> None:
        """Tokens of a step by slot; the others are idle."""
        texts = self.corpora.texts
        rows = [[*text, *emitted.get(slot, ())] for slot, text in enumerate(texts)]
        counts = [len(emitted.get(slot, ())) for slot in range(len(texts))]
        starts = [max(len(text) - 1, 0) for text in texts]
        self._commit(None, rows, starts, counts, C + 1)
        for slot, tokens in emitted.items():
            self.corpora.extend(slot, tokens)

    def _commit(self, slot, texts, starts, counts, width) -> None:
        """Rows `start` to `start + count` of texts; what is no token is rubbish."""
        tokens, following = np.full((2, len(texts), width), 3, np.int32)
        root = np.full(len(texts), 3, np.int32)
        for row, (text, start, count) in enumerate(
            zip(texts, starts, counts, strict=True)
        ):
            tokens[row, :count] = text[start : start + count]
            following[row, :count] = text[start + 1 : start + count + 1]
            if text:
                root[row] = text[start + count]
        arrays = dict(
            tokens=tokens,
            following=following,
            root=root,
            start=np.array(starts, np.int32),
            count=np.array(counts, np.int32),
            page_table=np.zeros((len(texts), 1), np.int32),
        )
        self.state = self._ingest(self.state, slot, arrays)


def ingester(ingest):
    """`Feeder`'s of a method that takes in `Committed`."""

    def run(state, slot, arrays):
        return ingest(state, Committed(slot, features=(), **arrays))

    by_chunk = jax.jit(run)
    by_step = jax.jit(lambda state, arrays: run(state, None, arrays))

    def call(state, slot, arrays):
        if slot is None:
            return by_step(state, arrays)
        return by_chunk(state, np.int32(slot), arrays)

    return call


# The corpora, and what is found in them.

TEXTS_INGEST = ingester(Texts.ingest)
LONGEST, FOUND = 4, 5
# Without a ring; one shorter than a text; one of several texts.
RINGS = (0, 9, 70)


@jax.jit
def found_in(texts: Texts, guesses_B1: jax.Array):
    """Matches of the texts' ends, and of the last token and a guess after it."""
    tail_B1n = matches.tail(texts, texts.lengths - 1, LONGEST)[:, None]
    guessed = jnp.stack([tail_B1n[:, :, -1], guesses_B1], axis=2)
    ring = texts.history.shape[0]
    pair = jnp.concatenate([guessed, guessed[:, :, ::-1]], axis=1)
    return (
        matches.find(texts, tail_B1n, C, FOUND, ring),
        matches.find(texts, tail_B1n, C, FOUND, 0),
        matches.find(texts, pair, C, FOUND, ring, guessed=1),
    )


def same_matches(found: Matches, row: int, expected: list[lookup.Match]) -> None:
    expected = expected[:FOUND]
    lengths = [match.length for match in expected] + [0] * (FOUND - len(expected))
    assert found.lengths[row].tolist() == lengths
    for following, match in zip(found.following[row].tolist(), expected, strict=False):
        padding = [NOBODY] * (C - len(match.following))
        assert following == [*match.following, *padding]


tokens = st.integers(0, 2)
slots = st.integers(0, B - 1)
BEGIN = st.tuples(
    slots,
    st.lists(tokens, min_size=1, max_size=MAX_LEN - 4),
    st.lists(st.integers(1, CHUNK), min_size=30, max_size=30),
    st.booleans(),
)
STEP = st.lists(st.lists(tokens, max_size=C + 1), min_size=B, max_size=B)


@pytest.mark.parametrize("ring", RINGS)
@settings(deadline=None, max_examples=60)
@given(events=st.lists(st.one_of(BEGIN, STEP), max_size=25), guess=tokens)
def test_texts_and_their_matches(ring, events, guess):
    """Texts come in any pieces, are aborted, and start again in used slots."""
    feeder = Feeder(Texts.empty(sizes(), ring), lookup.Corpora(B, ring), TEXTS_INGEST)
    corpora = feeder.corpora
    for event in events:
        if isinstance(event, tuple):
            feeder.begin(*event)
        else:
            emitted = {
                slot: more[: feeder.room(slot)]
                for slot, more in enumerate(event)
                if feeder.ready[slot]
            }
            feeder.step({slot: more for slot, more in emitted.items() if more})
    texts = jax.tree.map(np.asarray, feeder.state)
    for slot, text in enumerate(corpora.texts):
        assert texts.lengths[slot] == len(text)
        padding = [NOBODY] * (MAX_LEN + 1 - len(text))
        assert texts.text[slot].tolist() == [*text, *padding]
    assert np.roll(texts.history, -texts.written).tolist() == corpora.ring

    guesses = np.full((B, 1), guess, np.int32)
    in_all, in_text, of_guess = jax.tree.map(np.asarray, found_in(texts, guesses))
    for slot, text in enumerate(corpora.texts):
        tail = text[-LONGEST:]
        same_matches(in_all, slot, lookup.find(corpora, slot, tail, 0, C))
        without = lookup.Corpora(B, 0)
        without.texts = corpora.texts
        same_matches(in_text, slot, lookup.find(without, slot, tail, 0, C))
        if text:
            for row, pair in enumerate(([text[-1], guess], [guess, text[-1]])):
                expected = lookup.find(corpora, slot, pair, 1, C)
                same_matches(of_guess, 2 * slot + row, expected)


def test_matches_of_one_length_are_told_apart_in_a_long_text():
    """The latest comes first, and lengths are right, where scores pass 2^24."""
    longest, size = 64, 300_000
    run = [1] * longest
    search = jax.jit(lambda texts, tail: matches.find(texts, tail, 2, 3, 4))
    for shift in (0, 1):
        text = np.arange(size, dtype=np.int32) + 2
        # The end of a run of one token more: two matches that are as long as can be.
        end = size // 2 + shift
        text[end - longest - 1 : end] = 1
        text[-longest:] = 1
        texts = Texts(
            text=jnp.asarray(text)[None],
            lengths=jnp.array([size]),
            history=jnp.full(4, NOBODY),
            written=jnp.array(0),
        )
        found = search(texts, np.array([[run]], np.int32))
        assert found.lengths[0].tolist() == [longest, longest, longest - 1]
        after = [end + 2, end + 3], [1, end + 2], [1, 1]
        assert found.following[0].tolist() == [list(pair) for pair in after]


def test_what_no_score_can_tell_apart_is_refused():
    drafter, _ = made("suffix", longest=4096, history=0)
    with pytest.raises(UserError, match="longest=4096 .* max_len=1048576"):
        jax.eval_shape(lambda: drafter.init(sizes(1 << 20)))


def test_there_may_be_fewer_tokens_than_matches():
    @jax.jit
    def search(tail_B1n):
        texts = Texts.empty(sizes(5), 2)
        return matches.find(texts, tail_B1n, C, MATCHES, 2)

    found, none = search(np.zeros((B, 1, 2), np.int32)), Matches.none(sizes(5), MATCHES)
    for one, other in zip(vars(found).values(), vars(none).values(), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# Whole drafters.

SHAPES = {
    "ngram": ("chain:3", "regular:3x2x1", "dynamic:9@3", "none"),
    "suffix": ("regular:3x2x1", "dynamic:9@3"),
}
SEEDS = np.array([3, 1 << 31, 77], np.uint32)
# Of what was measured, after how many texts and steps it may differ by rounding.
CLOSE = 1e-4


def made(method: str, **options):
    """A drafter, and its options."""
    cls, found = speculation.find(SpeculativeConfig(method=method, options=options))
    return cls.make(None, 1.0, found), found


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """[B, positions, V]: of the generator that jax has."""

    def row(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (V,))

    rows = jax.vmap(jax.vmap(row, (None, 0)), (0, None))
    return np.asarray(jax.jit(rows)(SEEDS, np.arange(MAX_LEN + C + 1)))


def proposer(drafter):
    """Jitted: trees of one shape, and the state after them."""

    def run(shape, state, root, lengths, active, temperature):
        held = jnp.where(active, lengths, 0)
        zeros = jnp.zeros(B)
        sampling = Sampling(
            temperature, zeros.astype(jnp.int32), zeros + 1, zeros, jnp.asarray(SEEDS)
        )
        context = DraftContext(
            target=None,
            vocab=V,
            active=active,
            root=root,
            lengths=held,
            page_table=jnp.zeros((B, 1), jnp.int32),
            sampling=sampling,
            randomness=Randomness(sampling, held, shape.num_nodes, shape.depth, V),
            proposal="shared",
        )
        return drafter.propose(state, shape, context)

    return jax.jit(run, static_argnums=0)


class Writer:
    """Random texts that repeat themselves, and what others wrote."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.motif = self.rng.integers(0, V, 9).tolist()

    def more(self, text, count: int) -> list[int]:
        """Tokens after a text."""
        text, start = list(text), len(text)
        while len(text) < start + count:
            if self.rng.random() < 0.15:
                text += self.motif[self.rng.integers(0, 8) :]
            pair = text[-2:]
            earlier = [i for i in range(2, len(text)) if text[i - 2 : i] == pair]
            if earlier and self.rng.random() < 0.7:
                text.append(text[self.rng.choice(earlier)])
            else:
                text.append(int(self.rng.integers(0, V)))
        return text[start : start + count]

    def step(self, text, tree, slot: int, room: int) -> list[int]:
        """What a step emits: often what some path of the tree says, and a token."""
        path: list[int] = []
        node = 0
        while self.rng.random() < 0.8:
            family = [
                n
                for n in range(1, tree.tokens.shape[1])
                if tree.parents[slot, n] == node and tree.valid[slot, n]
            ]
            if not family:
                break
            node = self.rng.choice(family[:2])
            path.append(int(tree.tokens[slot, node]))
        depth = int(tree.depth[slot].max())
        path = path[:depth]
        return [*path, *self.more([*text, *path], 1)][:room]


@pytest.fixture(scope="module", params=["ngram", "suffix"])
def programs(request):
    """A drafter, its options, shapes to ask it for, and its jitted functions."""
    # A ring shorter than two texts; none.
    options = {"ngram": dict(history=41), "suffix": dict(longest=7, history=0)}
    drafter, found = made(request.param, **options[request.param])
    asked = [shapes.parse(name) for name in SHAPES[request.param]]
    return drafter, found, asked, ingester(drafter.ingest), proposer(drafter)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_trees_of_random_texts(seed, programs, noise):
    """All shapes by turns, greedy and not, in slots that are used again."""
    drafter, options, asked, ingest, propose = programs
    model = lookup.LookupDrafter(B, options.longest, options.history, MATCHES)
    feeder = Feeder(drafter.init(sizes()), model.corpora, ingest)
    texts, writer = model.corpora.texts, Writer(seed)
    rng, nodes = writer.rng, 0
    for _ in range(60):
        slot = int(rng.integers(0, B))
        if not feeder.ready[slot] or not feeder.room(slot) or rng.random() < 0.1:
            prompt = writer.more([], int(rng.choice([1, 2, 12, 20])))
            pieces = rng.integers(1, CHUNK + 1, 30)
            feeder.begin(slot, prompt, pieces, aborted=rng.random() < 0.1)
        active = [
            feeder.ready[slot] and feeder.room(slot) > 0 and rng.random() < 0.8
            for slot in range(B)
        ]
        temperature = rng.choice([0.0, 1.0, 0.5], B) * (rng.random() < 0.7)
        shape = asked[rng.integers(0, len(asked))]
        tree, feeder.state = propose(
            shape,
            feeder.state,
            np.array([text[-1] if text else 0 for text in texts], np.int32),
            np.array([max(len(text) - 1, 0) for text in texts], np.int32),
            np.array(active),
            temperature.astype(np.float32),
        )
        tree = jax.tree.map(np.asarray, tree)
        for slot in np.flatnonzero(active):
            model.look(slot, C if shape.depth else 0)

            rows = noise[slot, len(texts[slot]) :] if temperature[slot] else None

            def children(path, slot=slot, rows=rows):
                logs = model.children(slot, path)
                if not logs or rows is None:
                    return logs
                return lookup.lean(logs, rows[len(path)], drafter.tau)

            lookup.check(tree, slot, shape, children)
            nodes += tree.valid[slot].sum() - 1
        emitted = {
            slot: writer.step(texts[slot], tree, slot, feeder.room(slot))
            for slot in range(B)
            if active[slot]
        }
        feeder.step(emitted)
        model.observe(emitted)
        (part,) = feeder.state.parts
        measured = np.stack([part.rates.hits, part.rates.tries])
        expected = np.array([model.worth.hits, model.worth.tries])
        np.testing.assert_allclose(measured, expected, rtol=CLOSE)
    assert nodes > 200, "hardly anything is drafted: a dead test"
