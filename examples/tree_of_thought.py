"""A search over sentences, in the manner of tree of thought.

Every thought is a run of sampled tokens. Each round forks the thoughts that are alive,
lets all forks think in one batch, values them, and prunes all but the best. The prefix
that they share is in the cache once. A value here is the mean log-probability; put a
judge of your own in its place.

  python examples/tree_of_thought.py "once upon a time" 3
"""

from __future__ import annotations

import sys

from treespec_jax import LLM, Branch, SamplingParams

FORKS, ALIVE, LENGTH = 3, 2, 8


def value(branch: Branch) -> float:
    return branch.logprob / branch.position


def think(branches: list[Branch]) -> None:
    """A run of tokens on every branch, a pass of the target for each token of all."""
    growing = branches
    for _ in range(LENGTH):
        found = [(branch, branch.produce()) for branch in growing]
        found = [(branch, step) for branch, step in found if not step.is_stop]
        growing = [branch for branch, _ in found]
        Branch.commit_all([(branch, step.token) for branch, step in found])


def main(prompt: str = "once upon a time", rounds: str = "3") -> None:
    llm = LLM("tinystories-5m", speculative=None, max_batch=8)
    params = SamplingParams(temperature=0.9, seed=1)
    alive, seed = [Branch.create(llm, params).prefill(prompt)], 1
    for number in range(int(rounds)):
        thoughts = [parent.fork() for parent in alive for _ in range(FORKS)]
        for thought in thoughts:
            seed += 1
            thought.reseed(seed)
        think(thoughts)
        thoughts.sort(key=value, reverse=True)
        for branch in (*alive, *thoughts[ALIVE:]):
            branch.prune()
        alive = thoughts[:ALIVE]
        print(f"round {number + 1}: {value(alive[0]):.3f} {alive[0].text!r}")
    print(prompt + alive[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])
