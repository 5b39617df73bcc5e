"""Speculative decoding written with `Branch` alone.

A draft branch runs ahead greedily with a smaller model; the target's branch checks all
of its tokens in one pass, goes on with those that it agrees with, and adds its own next
one as a bonus. The text is what the target says by itself.

  python examples/speculate.py "once upon a time" 40
"""

from __future__ import annotations

import sys

from treespec_jax import LLM, Branch

AHEAD = 4


def agreed(target: Branch, guesses: list[int]) -> int:
    """How many guesses the target would have made, checked in one pass."""
    probes = [target.fork() for _ in guesses]
    Branch.commit_all((probe, guesses[: n + 1]) for n, probe in enumerate(probes))
    says = [branch.produce().token for branch in (target, *probes)]
    for probe in probes:
        probe.prune()
    wrong = (n for n, (a, b) in enumerate(zip(says, guesses, strict=False)) if a != b)
    return next(wrong, len(guesses))


def main(prompt: str = "once upon a time", tokens: str = "40") -> None:
    big = LLM("tinystories-5m", speculative=None, max_batch=8)
    small = LLM("tinystories-630k", speculative=None, max_batch=8)
    target = Branch.create(big).prefill(prompt)
    draft = Branch.create(small).prefill(prompt)
    iterations = drafted = accepted = 0
    end = target.position + int(tokens)
    while target.position < end:
        ahead, guesses = draft.fork(), []
        for _ in range(min(AHEAD, end - target.position)):
            guesses.append(ahead.produce().token)
            ahead.commit(guesses[-1])
        ahead.prune()
        right = agreed(target, guesses)
        iterations += 1
        drafted += len(guesses)
        accepted += right
        if right:
            target.commit(guesses[:right])
        bonus = target.produce().token
        target.commit(bonus)
        draft.commit([*guesses[:right], bonus])
    print(prompt + target.text)
    print(f"{iterations=} {drafted=} {accepted=} accept rate {accepted / drafted:.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
