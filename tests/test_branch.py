"""Branches against a model that keeps no cache and computes every text from scratch."""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from treespec_jax import LLM, Branch, SamplingParams, UserError
from treespec_jax.checkpoints import LoadedModel
from treespec_jax.config import ModelConfig
from treespec_jax.models.transformer import Transformer

V, PAGE, PAGES, MAX_LEN, CHUNK = 11, 8, 18, 40, 8
OPERATIONS, LIVE = 10_000, 10
CONFIG = ModelConfig(
    vocab_size=V,
    embed_dim=16,
    mlp_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=4200,
    eos_ids=(2,),
)
PARAMS = SamplingParams(temperature=0.8, seed=1, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = Transformer(CONFIG, rngs=nnx.Rngs(5))
    made.norm.scale[...] = made.norm.scale[...] * 3.0
    return made


def load(model, **engine) -> LLM:
    loaded = LoadedModel(CONFIG, model, None, "tiny", np.dtype("float32"))
    return LLM(loaded, **{"speculative": None, **engine})


@pytest.fixture(scope="module")
def llm(model) -> LLM:
    return load(
        model,
        max_batch=4,
        max_len=MAX_LEN,
        page_size=PAGE,
        num_pages=PAGES,
        steps_per_dispatch=4,
        prefill_chunks=(CHUNK,),
    )


class Scratch:
    """Logits and samples, computed from all tokens at once in batches of one size."""

    def __init__(self, model):
        self._batch = 128

        @jax.jit
        def logits(tokens_BS, last_B):
            B, S = tokens_BS.shape
            row_S = jnp.arange(S)
            causal = jnp.broadcast_to(row_S[:, None] >= row_S, (B, S, S))
            position = jnp.broadcast_to(row_S, (B, S))
            hidden = model(tokens_BS, position, causal).hidden.reshape(-1, B, S)
            return model.logits(hidden[:, jnp.arange(B), last_B])

        @jax.jit
        def samples(logits_BV, seed_B, position_B):
            def noise(seed, position):
                key = jax.random.key(seed, impl="threefry2x32")
                return jax.random.gumbel(jax.random.fold_in(key, position), (V,))

            scaled = logits_BV / PARAMS.temperature
            return jnp.argmax(scaled + jax.vmap(noise)(seed_B, position_B), axis=1)

        self._logits, self._samples = logits, samples

    def logits(self, texts) -> np.ndarray:
        """float32 [n, V], after the last token of each text."""
        rows = np.zeros(
            (-(-len(texts) // self._batch) * self._batch, MAX_LEN), np.int32
        )
        for row, text in zip(rows, texts, strict=False):
            row[: len(text)] = text
        last = np.zeros(len(rows), np.int32)
        last[: len(texts)] = [len(text) - 1 for text in texts]
        parts = [
            self._logits(rows[i : i + self._batch], last[i : i + self._batch])
            for i in range(0, len(rows), self._batch)
        ]
        return np.concatenate(parts)[: len(texts)]

    def samples(self, logits, seeds, positions) -> np.ndarray:
        """int32 [n], what comes after texts of so many tokens."""
        return np.asarray(
            self._samples(
                np.asarray(logits), np.array(seeds, np.uint32), np.array(positions)
            )
        )


class Walk:
    """Random operations, and what each branch must hold after them.

    Args:
      llm: without a drafter.
      seed: of the operations.
    """

    def __init__(self, llm, seed: int):
        self.llm, self.rng = llm, np.random.default_rng(seed)
        self.live: list[Branch] = []
        # By branch: tokens, seed, and log p so far.
        self.texts: dict[Branch, list[int]] = {}
        self.seen: dict[tuple[int, ...], list[np.ndarray]] = {}
        self.sampled: list[tuple[tuple[int, ...], int, int]] = []
        self.scored: list[tuple[tuple[int, ...], int, float]] = []
        self.done = collections.Counter()

    def pick(self) -> Branch:
        return self.live[self.rng.integers(len(self.live))]

    def run(self, count: int) -> None:
        names = "create fork produce commit commit_all merge prune reseed generate"
        weights = np.array([3, 5, 6, 6, 3, 2, 3, 1, 0.2])
        for _ in range(count):
            name = str(self.rng.choice(names.split(), p=weights / weights.sum()))
            if not self.live:
                name = "create"
            # Times with many branches and with few come in turn.
            limit = LIVE if self.done.total() // 100 % 2 else 3
            if len(self.live) > limit or (
                len(self.live) == limit and name in ("create", "fork")
            ):
                name = "prune"
            before = self.state()
            try:
                getattr(self, name)()
            except UserError as error:
                assert "pages are needed" in str(error) or "past max_len" in str(error)
                assert self.state() == before, "something changed"
                name = "too_few" if "pages" in str(error) else "too_long"
            self.done[name] += 1
            self.check()

    def state(self):
        """Tokens, pages and logits of every branch."""
        return [
            (b.tokens, tuple(b._cached.held.pages), id(b._cached.logits), b.logprob)
            for b in self.live
        ]

    def tokens(self, most: int) -> list[int]:
        return self.rng.integers(0, V, self.rng.integers(1, most + 1)).tolist()

    def create(self):
        # Few beginnings, so that many are known.
        start = np.tile([3 + self.rng.integers(2), 5, 7, 4], 6).tolist()
        prompt = [*start[: self.rng.integers(1, 25)], *self.tokens(3)]
        branch = Branch.create(self.llm, PARAMS)
        alive = max((_alike(prompt, text) for text in self.texts.values()), default=0)
        try:
            branch.prefill(prompt)
        except UserError:
            branch.prune()
            raise
        # At least what others hold now; more if what others held is there still.
        assert branch.shared_pages >= min(alive, (len(prompt) - 1) // PAGE)
        self.done["found again"] += branch.shared_pages > alive
        self.live.append(branch)
        self.texts[branch] = prompt

    def fork(self):
        branch = self.pick()
        fork = branch.fork()
        pages, its = branch._cached.held.pages, fork._cached.held.pages
        full = branch.position // PAGE
        assert pages[:full] == its[:full] and not set(pages[full:]) & set(its)
        self.live.append(fork)
        self.texts[fork] = list(self.texts[branch])
        assert fork.produce() == branch.produce()

    def produce(self):
        branch = self.pick()
        found = branch.produce()
        assert found == branch.produce()
        text = tuple(self.texts[branch])
        self.sampled.append((text, branch.params.seed, found.token))
        self.scored.append((text, found.token, found.logprob))

    def commit(self):
        self._commit([(self.pick(), self.tokens(6))])

    def commit_all(self):
        count = self.rng.integers(1, min(6, len(self.live)) + 1)
        chosen = self.rng.choice(len(self.live), count, replace=False)
        self._commit([(self.live[i], self.tokens(2)) for i in chosen])

    def _commit(self, pairs):
        before = [branch.logprob for branch, _ in pairs]
        Branch.commit_all(pairs)
        for (branch, tokens), logprob in zip(pairs, before, strict=True):
            if len(tokens) == 1:
                gained = branch.logprob - logprob
                self.scored.append((tuple(self.texts[branch]), tokens[0], gained))
            self.texts[branch] += tokens

    def merge(self):
        branch = self.pick()
        text = self.texts[branch]
        fits = [
            other
            for other in self.live
            if other is not branch
            and text[: len(self.texts[other])] == self.texts[other]
        ]
        if not fits:
            return
        parent = fits[self.rng.integers(len(fits))]
        logprob = branch.logprob
        branch.merge_into(parent)
        assert parent.logprob == logprob
        self.live.remove(branch)
        self.texts[parent] = self.texts.pop(branch)
        self.refuses(branch)

    def prune(self):
        branch = self.pick()
        branch.prune()
        self.live.remove(branch)
        del self.texts[branch]
        self.refuses(branch)

    def reseed(self):
        self.pick().reseed(int(self.rng.integers(2**32)))

    def generate(self):
        """Requests take pages and leave them, too."""
        params = dataclasses.replace(PARAMS, max_tokens=4)
        self.llm.generate([self.texts[self.pick()][:20]], params)

    def refuses(self, branch):
        for use in (branch.fork, branch.produce, lambda: branch.commit(1)):
            with pytest.raises(UserError, match="the branch was pruned"):
                use()

    def check(self):
        """Counts of pages and holders; logits are compared later."""
        holders = collections.Counter()
        for branch in self.live:
            assert list(branch.tokens) == self.texts[branch]
            pages = branch._cached.held.pages
            assert len(set(pages)) == len(pages) == -(-branch.position // PAGE)
            holders.update(pages)
            self.seen.setdefault(branch.tokens, [])
            if not any(branch._cached.logits is x for x in self.seen[branch.tokens]):
                self.seen[branch.tokens].append(branch._cached.logits)
        allocator = self.llm.engine._scheduler.pages.allocator
        for page in range(1, PAGES + 1):
            assert allocator.holders(page) == holders[page]
        assert self.llm.engine.free_pages == PAGES - len(holders)


def _alike(text, other) -> int:
    """Full pages in which two texts agree."""
    agree = 0
    while agree < min(len(text), len(other)) and text[agree] == other[agree]:
        agree += 1
    return agree // PAGE


def test_ten_thousand_operations_against_a_model_without_a_cache(llm, model):
    walk, scratch = Walk(llm, 0), Scratch(model)
    walk.run(OPERATIONS)
    rare = "found again", "too_few", "too_long", "merge", "generate"
    assert min(walk.done[name] for name in rare) > 50, walk.done
    assert llm.engine._scheduler.pages.allocator.evictions > 100
    texts = list(walk.seen)
    want = dict(zip(texts, scratch.logits(texts), strict=True))
    for text, logits in walk.seen.items():
        for found in logits:
            np.testing.assert_allclose(found, want[text], atol=1e-4)
    texts, seeds, tokens = zip(*walk.sampled, strict=True)
    logits = [want[text] for text in texts]
    samples = scratch.samples(logits, seeds, [len(text) for text in texts])
    assert (samples == tokens).mean() > 0.999, "but for ties"
    for text, token, logprob in walk.scored:
        log_z = np.logaddexp.reduce(want[text].astype(np.float64))
        assert abs(want[text][token] - log_z - logprob) < 1e-4
    while walk.live:
        walk.prune()
        walk.check()
    assert llm.engine.free_pages == PAGES


PLAN = (
    PARAMS,
    SamplingParams(),
    SamplingParams(
        temperature=1.0,
        seed=7,
        top_p=0.9,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        logit_bias={4: 1.0},
    ),
)


@pytest.mark.parametrize("params", PLAN, ids=["sampled", "greedy", "penalised"])
def test_a_loop_says_what_generate_says(llm, params):
    """To its end of text or twelve tokens, with the same log probabilities."""
    params = dataclasses.replace(params, max_tokens=12, logprobs=True)
    (want,) = llm.generate([[3, 5, 7, 4, 3]], params)
    with Branch.create(llm, params).prefill([3, 5, 7, 4, 3]) as branch:
        logprobs = []
        for _ in range(params.max_tokens):
            found = branch.produce()
            branch.commit(found.token)
            logprobs.append(found.logprob)
            if found.is_stop:
                break
        assert list(branch.tokens[5:]) == want.token_ids
        assert found.is_stop == (want.finish_reason == "stop")
        np.testing.assert_allclose(logprobs, want.logprobs, atol=1e-4)
        assert abs(branch.logprob - sum(logprobs)) < 1e-4
    assert branch.pruned and llm.engine.free_pages == PAGES


def test_seeds_decide_and_entropy_has_units(llm):
    root = Branch.create(llm, PARAMS).prefill([3, 5, 7])
    twin, other = root.fork(), root.fork()
    texts = []
    for branch, seed in ((root, None), (twin, None), (other, 99)):
        if seed is not None:
            branch.reseed(seed)
        for _ in range(12):
            branch.commit(branch.produce().token)
        texts.append(branch.tokens)
    assert texts[0] == texts[1] != texts[2]
    p = np.exp(root.logits - np.logaddexp.reduce(root.logits))
    nats = -np.sum(p * np.log(p))
    assert abs(root.entropy() - nats) < 1e-5
    assert abs(root.entropy("bits") - nats / np.log(2)) < 1e-5
    with pytest.raises(UserError, match="unit 'dits' is unknown"):
        root.entropy("dits")
    with pytest.raises(ValueError, match="read-only"):
        root.logits[0] = 1.0
    # Parents may go first, and those that nobody holds go by themselves.
    root.prune()
    root.prune()
    assert twin.produce() == twin.produce()
    del twin, other, branch
    llm.run(lambda engine: None)
    assert llm.engine.free_pages == PAGES


def test_what_cannot_be_is_refused_in_one_line(llm, model):
    with Branch.create(llm, {"seed": 1}) as empty:
        for use in (empty.produce, lambda: empty.commit(3), lambda: empty.logits):
            with pytest.raises(UserError, match="has no token yet; prefill"):
                use()
        for prompt, says in (([], "is empty"), ([V], "outside"), ("a", "tokenizer")):
            with pytest.raises(UserError, match=says):
                empty.prefill(prompt)
        branch = empty.fork().prefill([3, 4])
        with pytest.raises(UserError, match="has 2 tokens already"):
            branch.prefill([3])
        for tokens, says in (([], "nothing to commit"), (V, "outside"), (-1, ">= 0")):
            with pytest.raises(UserError, match=says):
                branch.commit(tokens)
        with pytest.raises(UserError, match="comes twice"):
            Branch.commit_all([(branch, 3), (branch, 4)])
        with pytest.raises(UserError, match="into another one"):
            branch.merge_into(branch)
        fork = branch.fork()
        fork.commit(5)
        branch.commit(6)
        with pytest.raises(UserError, match="gone another way"):
            fork.merge_into(branch)
        with pytest.raises(ValueError, match="3 branches are open"):
            llm.reset()
        fork.merge_into(empty)
        assert empty.tokens == (3, 4, 5) and fork.pruned
        branch.prune()
    assert llm.engine.free_pages == PAGES


def test_a_fork_takes_pages_and_no_memory(model):
    """64 forks of 4,000 tokens take less than two copies of them would."""
    page, tokens = 64, 4000
    llm = load(
        model,
        max_batch=8,
        max_len=4096,
        page_size=page,
        num_pages=160,
        prefill_chunks=(512,),
    )
    root = Branch.create(llm, PARAMS)
    root.prefill(np.random.default_rng(0).integers(3, V, tokens).tolist())
    one = 160 - llm.engine.free_pages
    assert one == -(-tokens // page)
    root.fork().prune()
    before = sum(x.nbytes for x in jax.live_arrays())
    forks = [root.fork() for _ in range(64)]
    assert sum(x.nbytes for x in jax.live_arrays()) == before
    assert 160 - llm.engine.free_pages == one + 64 < 3 * one
    Branch.commit_all([(fork, 3 + i % 4) for i, fork in enumerate(forks)])
    by_token = [fork.logits for fork in forks[:4]]
    for i, fork in enumerate(forks):
        np.testing.assert_allclose(fork.logits, by_token[i % 4], atol=1e-5)
    # 4,001 rows are in the pages of the forks: nothing was allocated.
    assert 160 - llm.engine.free_pages == one + 64
    llm.close()


def test_a_device_that_fails_closes_branches_only_if_their_rows_are_lost(llm):
    root = Branch.create(llm, PARAMS).prefill([3, 5, 7])
    executor = llm.engine._executor
    before, real = root.logits, executor.extend
    with pytest.MonkeyPatch.context() as patched:

        def fail(plan):
            raise MemoryError("none is left")

        patched.setattr(executor, "extend", fail)
        with pytest.raises(MemoryError, match="none is left"):
            root.commit(4)
        assert root.tokens == (3, 5, 7) and root.logits is not None

        def lose(plan):
            real(plan)
            jax.tree.map(lambda x: x.delete(), executor._state.pages)
            fail(plan)

        patched.setattr(executor, "extend", lose)
        with pytest.raises(MemoryError, match="none is left"):
            root.commit(4)
    assert root.pruned and llm.engine.free_pages == PAGES
    with Branch.create(llm, PARAMS).prefill([3, 5, 7]) as again:
        assert not again.shared_pages
        np.testing.assert_allclose(again.logits, before, atol=1e-5)
