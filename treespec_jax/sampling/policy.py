"""What each request samples from, and where its randomness comes from.

The policy is the target's own distribution after temperature, top-k, top-p and min-p,
in that order. All three truncations keep tokens above a threshold, so they compose as
the highest of the three. A token that ties with the threshold is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from treespec_jax import branches
from treespec_jax.branches import branch
from treespec_jax.sampling import select

# Temperatures below this are greedy: logits / temperature would overflow.
MIN_TEMPERATURE = 1e-5
# Sorted candidates looked at before the whole vocabulary is sorted. Distributions that
# need more (a flat one with top-p, or a larger top-k) take the slow path, same result.
SHORT_LIST = 256
# Bits of a threshold that one pass over the scores finds where there is no loop.
SEARCH_BITS = 4


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_k", "top_p", "min_p", "seed"),
    meta_fields=("known",),
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings per slot, as arrays, so that they may differ within a batch.

    Attributes:
      temperature: float32 [B]; 0 is greedy.
      top_k: int32 [B]; 0 keeps all.
      top_p: float32 [B].
      min_p: float32 [B].
      seed: uint32 [B].
      known: static, what of all slots is known beforehand.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    known: branches.Known = branches.NOTHING

    @property
    def greedy(self) -> jax.Array:
        """bool [B]."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def all_greedy(self) -> bool | jax.Array:
        """Whether every slot is greedy: known, or bool []."""
        said = self.known.all_greedy
        return jnp.all(self.greedy) if said is None else said

    @property
    def any_greedy(self) -> bool | jax.Array:
        """Whether some slot may be greedy: known, or bool []."""
        said = self.known.any_greedy
        return jnp.any(self.greedy) if said is None else said

    @property
    def truncated(self) -> bool | jax.Array:
        """Whether top-k or top-p cut some slot that samples: known, or bool []."""
        said = self.known.truncated
        return jnp.any(self.cuts) if said is None else said

    @property
    def cuts(self) -> jax.Array:
        """bool [B]: slots that sample, with top-k or top-p."""
        return ~self.greedy & ((self.top_k > 0) | (self.top_p < 1.0))

    def neutral(self) -> Sampling:
        """Settings that leave log p as it is, for scores that are already the policy's.

        Greedy slots stay greedy.
        """
        return Sampling(
            temperature=jnp.where(self.greedy, 0.0, 1.0),
            top_k=jnp.zeros_like(self.top_k),
            top_p=jnp.ones_like(self.top_p),
            min_p=jnp.zeros_like(self.min_p),
            seed=self.seed,
            known=dataclasses.replace(self.known, truncated=False),
        )

    def softened(self) -> Sampling:
        """Greedy slots at temperature 1 with nothing cut, the others as they are."""
        greedy = self.greedy
        return Sampling(
            temperature=jnp.where(greedy, 1.0, self.temperature),
            top_k=jnp.where(greedy, 0, self.top_k),
            top_p=jnp.where(greedy, 1.0, self.top_p),
            min_p=jnp.where(greedy, 0.0, self.min_p),
            seed=self.seed,
            known=dataclasses.replace(self.known, all_greedy=False, any_greedy=False),
        )


def from_host(
    settings: Mapping[str, np.ndarray],
    straight: bool,
    running: Sequence[int] = (),
    logprobs: bool = False,
) -> Sampling:
    """Settings that the host has, with what it knows of them.

    Args:
      settings: fields of `Sampling`, NumPy arrays.
      straight: whether they are for a program without conditionals, which is compiled
        for what the running slots want (`branches.Known`).
      running: these slots; empty: all.
      logprobs: whether one of them wants log probabilities.
    """
    if not straight:
        return Sampling(**settings)
    rows = list(running) or slice(None)
    greedy = settings["temperature"][rows] < MIN_TEMPERATURE
    cuts = (settings["top_k"][rows] > 0) | (settings["top_p"][rows] < 1.0)
    known = branches.Known(
        straight=True,
        all_greedy=bool(greedy.all()),
        # Which would make programs of its own, for next to nothing.
        any_greedy=True,
        truncated=bool((cuts & ~greedy).any()),
        logprobs=logprobs,
    )
    return Sampling(**settings, known=known)


def truncate(logits_VR: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits over temperature, with -inf where top-k, top-p or min-p cut.

    Columns of greedy slots come back unscaled.

    Args:
      logits_VR: float32, R = B·T columns, B major.
      sampling: settings per slot.

    Returns:
      float32 [V, R].
    """
    settings = _per_column(sampling, logits_VR.shape[1])
    scale_R, _, floor_R = _bounds(logits_VR, settings)
    scaled = logits_VR * scale_R
    return jnp.where(scaled >= floor_R, scaled, -jnp.inf)


def _bounds(logits_VR, settings: Sampling):
    """1 / temperature, and of logits times it the largest and the least kept, [R] each.

    Only reads the logits: an array of their size costs more than the sums over it.
    """
    # A product, so that here and in every loop it rounds alike; a compiler may or may
    # not make one of a division.
    scale_R = 1.0 / jnp.where(settings.greedy, 1.0, settings.temperature)
    best_R = jnp.max(logits_VR, axis=0) * scale_R
    floor_R = best_R + jnp.log(jnp.where(settings.greedy, 0.0, settings.min_p))
    cut_R = branch(
        settings.truncated,
        lambda: _rank_threshold(logits_VR * scale_R, best_R, settings),
        lambda: jnp.full_like(best_R, -jnp.inf),
    )
    floor_R = jnp.maximum(floor_R, jnp.where(settings.cuts, cut_R, -jnp.inf))
    return scale_R, best_R, floor_R


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distributions:
    """p of the policy after some nodes, as what it takes to work it out.

    Nothing here but the logits has the size of the vocabulary, so that a rule pays for
    the entries that it looks at.

    Attributes:
      logits: [V, R], a column per node, B major.
      scale: [R], 1 / temperature; 1 for greedy slots.
      best: [R], largest of logits / temperature.
      floor: [R], least of them that is kept.
      point: int32 [R], the only token of a greedy slot; -1 for others.
      total: [R], sum of exp(logits / temperature - best) over what is kept.
    """

    logits: jax.Array
    scale: jax.Array
    best: jax.Array
    floor: jax.Array
    point: jax.Array
    total: jax.Array

    def _weights(self, logits, token):
        scaled = logits * self.scale
        allowed = (scaled >= self.floor) & ((self.point < 0) | (self.point == token))
        return jnp.where(allowed, jnp.exp(scaled - self.best), 0.0)

    def _tokens_V1(self):
        return jnp.arange(self.logits.shape[0], dtype=jnp.int32)[:, None]

    def probabilities(self) -> jax.Array:
        """p [V, R]."""
        return self._weights(self.logits, self._tokens_V1()) * (1.0 / self.total)

    def log_probabilities(self) -> jax.Array:
        """log p [V, R], -inf where p is 0; not of greedy slots."""
        scaled = self.logits * self.scale
        log_VR = scaled - (self.best + jnp.log(self.total))
        return jnp.where(scaled >= self.floor, log_VR, -jnp.inf)

    def of(self, tokens: jax.Array, columns: jax.Array) -> jax.Array:
        """p of given tokens after given columns, int32 of one shape each."""
        chosen = jax.tree.map(
            lambda x: x[columns], dataclasses.replace(self, logits=self.best)
        )
        return chosen._weights(self.logits[tokens, columns], tokens) / chosen.total

    def entropy(self) -> jax.Array:
        """[R], in nats."""
        weights = self._weights(self.logits, self._tokens_V1())
        gap = self.logits * self.scale - self.best
        energy = jnp.sum(jnp.where(weights > 0, weights * gap, 0.0), axis=0)
        return jnp.log(self.total) - energy / self.total


def distributions(logits_VR: jax.Array, sampling: Sampling) -> Distributions:
    """The policy after every column. Arguments as for `truncate`."""
    settings = _per_column(sampling, logits_VR.shape[1])
    scale_R, best_R, floor_R = _bounds(logits_VR, settings)
    point_R = branch(
        settings.any_greedy,
        lambda: jnp.where(settings.greedy, select.argmax(logits_VR), -1),
        lambda: jnp.full(settings.greedy.shape, -1, jnp.int32),
    )
    one = jnp.ones((), logits_VR.dtype)
    bare = Distributions(
        logits=logits_VR,
        scale=scale_R,
        best=best_R,
        floor=floor_R,
        point=point_R,
        total=one,
    )
    return dataclasses.replace(bare, total=jnp.sum(bare.probabilities(), axis=0))


def scores(logits_VR: jax.Array, sampling: Sampling) -> jax.Array:
    """log p [V, R] of the policy, -inf where p is 0. Arguments as for `truncate`."""
    return jnp.log(distributions(logits_VR, sampling).probabilities())


def _per_column(sampling: Sampling, columns: int) -> Sampling:
    """Settings [B] repeated for the nodes of each slot."""
    repeats = columns // sampling.seed.shape[0]
    return jax.tree.map(lambda x: jnp.repeat(x, repeats), sampling)


def _rank_threshold(scaled_VR, best_R, sampling):
    """Lowest kept score [R] under top-k, then top-p of what top-k kept."""
    vocab = scaled_VR.shape[0]
    top_k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    top_k, top_p, best = top_k[:, None], sampling.top_p[:, None], best_R[:, None]
    whole = jnp.sum(jnp.exp(scaled_VR - best_R), axis=0)[:, None]

    def from_list(length):
        """Threshold [R], and whether the `length` best scores decide it."""
        sorted_RJ, _ = select.top_k(scaled_VR, length)
        last_k = jnp.minimum(top_k, length) - 1
        least = jnp.take_along_axis(sorted_RJ, last_k, axis=1)
        # What ties with the k-th is kept by top-k, and so counts for top-p.
        weights = jnp.where(sorted_RJ >= least, jnp.exp(sorted_RJ - best), 0.0)
        cumulative = jnp.cumsum(weights, axis=1)
        ends = (length == vocab) | (sorted_RJ[:, -1:] < least)
        complete = (top_k <= length) & ends
        total = jnp.where(complete, cumulative[:, -1:], whole)
        enough = cumulative >= top_p * total
        reached = jnp.any(enough, axis=1, keepdims=True)
        reached &= complete | (top_k >= vocab)
        first = jnp.argmax(enough, axis=1, keepdims=True)
        by_p = jnp.where(reached & (top_p < 1.0), first, length - 1)
        last = jnp.minimum(by_p, last_k)
        threshold = jnp.take_along_axis(sorted_RJ, last, axis=1)
        nothing = (top_k >= vocab) & (top_p >= 1.0)
        decided = nothing | jnp.where(top_p < 1.0, reached, top_k <= length)
        return jnp.where(nothing, -jnp.inf, threshold)[:, 0], jnp.all(decided)

    if vocab <= SHORT_LIST:
        return from_list(vocab)[0]
    if sampling.known.straight:
        return _searched_threshold(scaled_VR, best_R, sampling)
    short, decided = from_list(SHORT_LIST)
    return lax.cond(
        decided,
        lambda: short,
        lambda: _searched_threshold(scaled_VR, best_R, sampling),
    )


def _searched_threshold(scaled_VR, best_R, settings: Sampling):
    """Lowest kept score [R], by bisection over the values that a float can have.

    Sorting whole columns would cost an accelerator's compiler about as much as the rest
    of the program. Without a loop, several bits are found in each pass.
    """
    vocab, top_p_R = scaled_VR.shape[0], settings.top_p
    limit_R = jnp.minimum(settings.top_k, vocab)
    top_k_R = jnp.where(settings.top_k > 0, limit_R, vocab)
    bits_VR = lax.bitcast_convert_type(scaled_VR, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Unsigned numbers in the order of the floats.
    order_VR = jnp.where(bits_VR >= sign, ~bits_VR, bits_VR | sign)

    def largest(enough):
        """The largest number [R] for which `enough`, true of 0, still is."""
        found_R = jnp.zeros(best_R.shape, jnp.uint32)
        if settings.known.straight:
            digits = np.arange(1, 1 << SEARCH_BITS, dtype=np.uint32)
            for shift in range(32 - SEARCH_BITS, -1, -SEARCH_BITS):
                trials = [found_R | np.uint32(digit << shift) for digit in digits]
                count_R = sum(enough(t).astype(jnp.uint32) for t in trials)
                found_R |= count_R << np.uint32(shift)
            return found_R

        def body(i, found_R):
            trial_R = found_R | (sign >> i.astype(jnp.uint32))
            return jnp.where(enough(trial_R), trial_R, found_R)

        return lax.fori_loop(0, 32, body, found_R)

    def total_above(least_R):
        weights_VR = jnp.exp(scaled_VR - best_R)
        return jnp.sum(jnp.where(order_VR >= least_R, weights_VR, 0.0), axis=0)

    by_k_R = largest(lambda t: jnp.sum(order_VR >= t, axis=0) >= top_k_R)
    share_R = top_p_R * total_above(by_k_R)
    by_p_R = largest(lambda t: total_above(t) >= share_R)
    found_R = jnp.where(top_p_R < 1.0, jnp.maximum(by_k_R, by_p_R), by_k_R)
    bits_R = jnp.where(found_R >= sign, found_R ^ sign, ~found_R)
    threshold_R = lax.bitcast_convert_type(bits_R, jnp.float32)
    nothing_R = (top_k_R >= scaled_VR.shape[0]) & (top_p_R >= 1.0)
    return jnp.where(nothing_R, -jnp.inf, threshold_R)


def perturbed(
    logits_VR: jax.Array, noise_VB: jax.Array, sampling: Sampling
) -> jax.Array:
    """float32 [V, R]: truncated log p (up to a constant) plus the noise of a position.

    Args:
      logits_VR: float32, R = B·W columns, B major; those of a slot are at one depth.
      noise_VB: float32, of the position after them (`noise.Noise.after`); or [V, B, W],
        where they are at depths of their own.
      sampling: settings per slot.
    """
    V, B = noise_VB.shape[:2]
    noise_VBW = noise_VB.reshape(V, B, -1)
    quiet_VBW = jnp.where(sampling.greedy[:, None], 0.0, noise_VBW)
    spread = jnp.broadcast_to(quiet_VBW, (V, B, logits_VR.shape[1] // B))
    return truncate(logits_VR, sampling) + spread.reshape(logits_VR.shape)


def choose(logits_VR: jax.Array, noise_VB: jax.Array, sampling: Sampling) -> jax.Array:
    """int32 [R]: the token that the policy emits after each node.

    `argmax(log p + g)` with the noise of the position after the node (Gumbel-max): a
    sample from p. Greedy slots take the argmax of the logits. Arguments as for
    `perturbed`.
    """
    return select.argmax(perturbed(logits_VR, noise_VB, sampling))
