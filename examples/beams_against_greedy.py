"""Beam search against greedy decoding: likelier texts, and what drafting saves.

python examples/beams_against_greedy.py "once upon a time" 24 4
"""

from __future__ import annotations

import sys

from treespec_jax import LLM


def main(
    prompt: str = "once upon a time", tokens: str = "24", beams: str = "4"
) -> None:
    count = int(beams)
    llm = LLM("tinystories-5m", max_batch=count)
    # Without a penalty a score is the log-probability; one beam is greedy decoding.
    settings = dict(max_tokens=int(tokens), length_penalty=0.0)
    greedy = llm.beam_search(prompt, beams=1, **settings)[0]
    found = llm.beam_search(prompt, beams=count, n_best=count, **settings)[0]
    print(f"greedy {greedy[0].score:.2f} {greedy[0].text!r}")
    for text in found:
        print(f"beam   {text.score:.2f} {text.text!r}")
    for name, stats in (("greedy", greedy.stats), ("beams", found.stats)):
        print(
            f"{name}: {stats.tokens} levels in {stats.steps} passes of the target, "
            f"{stats.tokens_per_step:.2f} per pass"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
