"""Best of n, forked only where the target is in doubt.

One branch grows greedily; where its entropy is high it is forked to its second choice,
as long as fewer than n texts grow. The text with the best mean log-probability wins.

  python examples/best_of_n.py "once upon a time" 30 4
"""

from __future__ import annotations

import sys

import numpy as np

from treespec_jax import LLM, Branch

DOUBT = 1.5  # bits


def second_choice(branch: Branch) -> int:
    return int(np.argsort(branch.logits)[-2])


def main(prompt: str = "once upon a time", tokens: str = "30", n: str = "4") -> None:
    llm = LLM("tinystories-5m", speculative=None, max_batch=8)
    root = Branch.create(llm).prefill(prompt)
    growing, done = [root], []
    for _ in range(int(tokens)):
        steps = []
        for branch in list(growing):
            if branch.entropy("bits") > DOUBT and len(growing) + len(done) < int(n):
                other = branch.fork()
                growing.append(other)
                steps.append((other, second_choice(other)))
            found = branch.produce()
            if found.is_stop:
                growing.remove(branch)
                done.append(branch)
            else:
                steps.append((branch, found.token))
        Branch.commit_all(steps)
    start = len(llm.encode(prompt))

    def mean(branch: Branch) -> float:
        return branch.logprob / max(1, branch.position - start)

    for branch in sorted([*growing, *done], key=mean, reverse=True):
        print(f"{mean(branch):.3f} {prompt}{branch.text}")
        branch.prune()


if __name__ == "__main__":
    main(*sys.argv[1:])
