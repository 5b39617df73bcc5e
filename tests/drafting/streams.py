"""Random texts that run through a drafter on the device and through a plain model.

Prompts come in chunks, slots are idle now and then and are taken over, nodes are
rejected, and what the target says is random: nothing here is a language.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.drafting import host
from treespec_jax.cache.pages import CacheLayout
from treespec_jax.drafting.protocol import Committed, DraftContext, Sizes, Successors
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.randomness import Randomness
from treespec_jax.trees import shapes

B, V, MAX_LEN, DEPTH = 3, 11, 48, 3
# Rows that the target computes in a step and in a chunk, at most.
ROWS, CHUNK = 8, 4
SEEDS = np.array([3, 4, 5], np.uint32)
# Chance of an accepted child, and of a slot that takes part in a step.
RIGHT, BUSY = 0.7, 0.8


def proposing(drafter, name: str, proposal: str = "shared"):
    """The compiled function that grows trees of a shape."""
    shape = shapes.parse(name)

    @jax.jit
    def run(state, root, lengths, active, temperature):
        settings = Sampling(
            temperature,
            jnp.zeros(B, jnp.int32),
            jnp.ones(B),
            jnp.zeros(B),
            jnp.asarray(SEEDS),
        )
        nodes, depth = shape.num_nodes, shape.depth
        context = DraftContext(
            target=None,
            vocab=V,
            active=active,
            root=root,
            lengths=lengths,
            page_table=jnp.zeros((B, 1), jnp.int32),
            sampling=settings,
            randomness=Randomness(settings, lengths, nodes, depth, V),
            proposal=proposal,
        )
        return drafter.propose(state, shape, context)

    return run


def compare(shape, tree, slot: int, want) -> int:
    """Asserts that a slot's tree is the model's, node by node; returns their number."""
    paths, found = {0: ()}, []
    for node in range(1, shape.num_nodes):
        above = paths.get(tree.parents[slot, node])
        found.append(None)
        if tree.valid[slot, node]:
            paths[node] = (*above, int(tree.tokens[slot, node]))
            log = tree.draft_logprob[slot, node]
            source = 0 if tree.source is None else tree.source[slot, node]
            found[-1] = paths[node], log, source
            assert tree.depth[slot, node] == len(paths[node])
    if not isinstance(shape, shapes.StaticShape):
        found = [node for node in found if node]
    assert [node and node[0] for node in found] == [n and n.path for n in want]
    pairs = [pair for pair in zip(found, want, strict=True) if pair[0]]
    for (_, log, source), wanted in pairs:
        assert abs(log - wanted.logs[-1]) < 1e-4 and source == wanted.source
    return len(pairs)


@jax.jit
def noise():
    """Of all slots and positions, float32 [B, S, V], as jax.random makes it."""

    def row(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (V,))

    positions = jnp.arange(MAX_LEN + DEPTH + 1)
    return jax.vmap(lambda s: jax.vmap(lambda p: row(s, p))(positions))(SEEDS)


@dataclasses.dataclass
class Counts:
    """What a stream has seen."""

    trees: int = 0
    doubtful: int = 0
    nodes: int = 0
    accepted: int = 0


class Stream:
    """A drafter and its model, side by side.

    Args:
      drafter: without a model of its own.
      seed: of the texts.
    """

    def __init__(self, drafter, seed: int = 0):
        self.drafter = drafter
        self.state = drafter.init(
            Sizes(B, MAX_LEN, DEPTH, CacheLayout(2, 16), V, DEPTH + 1)
        )
        self.seen = Counts()
        self._rng = np.random.default_rng(seed)
        self._texts: list[list[int]] = [[] for _ in range(B)]
        self._proposing = {}
        self._by_step = jax.jit(self._ingest)
        self._by_chunk = jax.jit(self._ingest)
        self._noise = np.asarray(noise())

    def begin(self, model, slot: int, length: int) -> None:
        """A new text, in chunks; its last token is the first root."""
        text = self._rng.integers(0, V, length).tolist()
        self._texts[slot] = text
        last, end = length - 1, 0
        while True:
            start, end = end, min(last, end + int(self._rng.integers(1, CHUNK + 1)))
            self._feed(model, slot, start, end)
            if end == last:
                break

    def step(self, model, name: str, temperatures) -> None:
        """A tree for every busy slot, compared; then some of it is accepted."""
        shape = shapes.parse(name)
        busy = [
            bool(text) and len(text) + DEPTH < MAX_LEN and self._rng.random() < BUSY
            for text in self._texts
        ]
        tree = self._propose(name, busy, temperatures)
        steps, rows = [], []
        arrays = self._arrays((B, ROWS), (B, DEPTH + 1))
        for slot in np.flatnonzero(busy):
            self._compare(model, shape, tree, slot, temperatures[slot])
        for slot in np.flatnonzero(busy):
            said = self._say(arrays, slot, tree.tokens[slot], tree.valid[slot])
            rows += said.values()
            path = self._walk(tree, slot)
            tokens = tree.tokens[slot, path].tolist()
            following = [*tokens[1:], int(self._rng.integers(0, V))]
            start = len(self._texts[slot]) - 1
            self._texts[slot] += following
            self._commit(arrays, slot, tokens, following, start)
            arrays["newest"][slot] = path[-1]
            arrays["path"][slot, : len(path)] = path
            steps.append(host.Step(slot, start, tokens, following, said[path[-1]]))
            self.seen.accepted += len(path) - 1
        self.state = self._by_step(self.state, None, arrays)
        model.steps(steps, rows)

    def _feed(self, model, slot: int, start: int, end: int) -> None:
        arrays, text = self._arrays((1, CHUNK), (1, CHUNK)), self._texts[slot]
        count = end - start
        tokens = np.resize(np.array([*text[start:end], 0]), CHUNK)
        said = self._say(arrays, 0, tokens, np.arange(CHUNK) < count, slot)
        following = text[start + 1 : end + 1] or [text[end]]
        self._commit(arrays, 0, text[start:end], following, start)
        arrays["newest"][0] = max(count - 1, 0)
        arrays["path"][0] = np.arange(CHUNK)
        self.state = self._by_chunk(self.state, np.int32(slot), arrays)
        model.chunk(slot, text, start, end, list(said.values()))

    def _arrays(self, rows, columns) -> dict[str, np.ndarray]:
        """Of `Committed` and `Successors`, of noise where nothing is real."""
        count = self.drafter.needs.successors

        def noise(shape):
            return self._rng.integers(0, V, shape).astype(np.int32)

        order = np.argsort(self._rng.random((*rows, V)), axis=2)[:, :, :count]
        logits = 2 * self._rng.normal(size=(*rows, count)).astype(np.float32)
        return {
            "tokens": noise(columns),
            "following": noise(columns),
            "root": noise(rows[:1]),
            "start": np.zeros(rows[:1], np.int32),
            "count": np.zeros(rows[:1], np.int32),
            "rows": noise(rows),
            "real": np.zeros(rows, bool),
            "best": order.astype(np.int32),
            "logits": -np.sort(-logits, axis=2),
            "newest": np.zeros(rows[:1], np.int32),
            "path": np.zeros(columns, np.int32),
        }

    def _say(self, arrays, index, tokens, real, slot=None) -> dict[int, host.Row]:
        """What the target says after some rows, by their numbers."""
        count = len(tokens)
        arrays["rows"][index, :count] = tokens
        arrays["real"][index, :count] = real
        best, logits = arrays["best"][index], arrays["logits"][index]
        slot = index if slot is None else slot
        return {
            int(n): host.Row(slot, int(tokens[n]), best[n].tolist(), logits[n].tolist())
            for n in np.flatnonzero(real)
        }

    def _commit(self, arrays, index, tokens, following, start) -> None:
        arrays["tokens"][index, : len(tokens)] = tokens
        arrays["following"][index, : len(following)] = following
        arrays["root"][index] = following[-1]
        arrays["start"][index] = start
        arrays["count"][index] = len(tokens)

    def _ingest(self, state, slot, arrays):
        names = "rows", "real", "best", "logits", "newest", "path"
        successors = Successors(*(arrays[name] for name in names))
        names = "tokens", "following", "root", "start", "count"
        committed = Committed(
            slot=slot,
            features=(),
            page_table=jnp.zeros((len(arrays["root"]), 1), jnp.int32),
            successors=successors,
            **{name: arrays[name] for name in names},
        )
        return self.drafter.ingest(state, committed)

    def _propose(self, name, busy, temperatures):
        if name not in self._proposing:
            self._proposing[name] = proposing(self.drafter, name)
        pairs = list(zip(self._texts, busy, strict=True))
        tree, self.state = self._proposing[name](
            self.state,
            np.array([text[-1] if text else 0 for text in self._texts], np.int32),
            np.array([len(t) - 1 if b else 0 for t, b in pairs], np.int32),
            np.array(busy),
            np.array(temperatures, np.float32),
        )
        return jax.tree.map(np.asarray, tree)

    def _compare(self, model, shape, tree, slot: int, temperature: float) -> None:
        """The device's tree of a slot against the model's, node by node."""
        root, start = self._texts[slot][-1], len(self._texts[slot]) - 1
        model.look(slot, root, shape.depth)

        def guesses(path):
            found = model.guesses(slot, root, path)
            if temperature == 0:
                return found
            noise = self._noise[slot, start + 1 + len(path)]
            return host.leaning(found, noise, self.drafter.tau)

        self.seen.trees += 1
        try:
            want = host.grow(shape, guesses)
        except host.Doubt:
            self.seen.doubtful += 1
        else:
            self.seen.nodes += compare(shape, tree, slot, want)

    def _walk(self, tree, slot: int) -> list[int]:
        """Nodes of an accepted path, from the root."""
        path = [0]
        while self._rng.random() < RIGHT:
            below = np.flatnonzero((tree.parents[slot] == path[-1]) & tree.valid[slot])
            below = below[below > 0]
            if not len(below):
                break
            path.append(int(self._rng.choice(below)))
        return path


def run(stream: Stream, model, names, steps: int, prompts: int = 6) -> Counts:
    """Some prompts, then steps, with new texts in between."""
    rng = np.random.default_rng(1)
    for slot in range(B):
        stream.begin(model, slot, int(rng.integers(1, 9)))
    begins = set(rng.integers(2, steps, prompts).tolist())
    for number in range(steps):
        if number in begins:
            stream.begin(model, int(rng.integers(0, B)), int(rng.integers(1, 9)))
        temperatures = rng.choice([0.0, 1.0], B) if number % 3 else np.zeros(B)
        stream.step(model, names[number % len(names)], temperatures)
    return stream.seen
