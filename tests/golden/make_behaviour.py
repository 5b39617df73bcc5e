"""Token ids of the bundled pair under every rule, shape and kind of sampling.

  python tests/golden/make_behaviour.py            compares with behaviour.json
  python tests/golden/make_behaviour.py --write    replaces it

A change that is meant to keep behaviour must leave the file as it is.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("behaviour.json")
TOKENS = 24
BATCHES = (5, 1)
SHAPES = ("chain:3", "regular:3x2x1", "allotted:7@4")


@dataclasses.dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
      speculative: of the LLM.
      penalised: also run requests with penalties, which is another program.
    """

    speculative: dict[str, Any]
    penalised: bool = False

    @property
    def name(self) -> str:
        return " ".join(str(v) for v in self.speculative.values()) or "plain"


def cases() -> list[Case]:
    found = [Case({}, penalised=True)]
    for tree in ("chain:3", "regular:3x2x1", "dynamic:7@4"):
        found.append(Case({"rule": "exact", "tree": tree}, tree != "chain:3"))
    found.append(Case({"rule": "exact", "tree": "regular:3x2x1", "proposal": "best"}))
    found.append(Case({"rule": "exact", "tree": "allotted:7@4", "proposal": "sampled"}))
    for tree in SHAPES:
        found.append(Case({"rule": "token", "tree": tree}, tree == "regular:3x2x1"))
    found.append(
        Case({"rule": "token", "tree": "regular:3x2x1", "proposal": "with_replacement"})
    )
    found.append(Case({"rule": "block", "tree": "chain:3"}))
    for tree in SHAPES:
        penalised = tree == "allotted:7@4"
        found.append(Case({"rule": "traversal", "tree": tree}, penalised))
    for rule in ("terminal", "typical"):
        for tree in ("chain:3", "regular:3x2x1", "dynamic:7@4"):
            found.append(Case({"rule": rule, "tree": tree}))
    for rule, tree, cascade in (
        ("exact", "chain:3", "token_v3"),
        ("exact", "allotted:7@4", "chow"),
        ("token", "regular:3x2x1", "opt"),
        ("terminal", "regular:3x2x1", "token_v1"),
    ):
        found.append(
            Case({"rule": rule, "tree": tree, "cascade": cascade, "alpha": 0.2})
        )
    return found


def batches(penalised: bool) -> Iterator[tuple[str, list]]:
    """Requests by name: greedy alone, sampled alone, mixed; with penalties."""
    from treespec_jax.config import SamplingParams

    base = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    sampled = [
        dict(temperature=0.7, top_p=0.9),
        dict(temperature=1.0, top_k=40),
        dict(temperature=1.0, min_p=0.05),
        dict(temperature=0.3),
        dict(temperature=1.0),
    ]
    plans = {
        "greedy": [{}] * 5,
        "sampled": sampled,
        "mixed": [{}, *sampled[:2], {}, sampled[4]],
    }
    if penalised:
        plans["penalised"] = [
            dict(repetition_penalty=1.3),
            dict(temperature=0.8, presence_penalty=0.7, frequency_penalty=0.4),
            dict(temperature=1.0, top_k=40, logit_bias={300: 4.0, 13: -100}),
            {},
            dict(temperature=1.0, top_p=0.9, repetition_penalty=1.1),
        ]
    for name, plan in plans.items():
        yield (
            name,
            [dataclasses.replace(base, seed=i, **own) for i, own in enumerate(plan)],
        )


def run(case: Case, pair, batch: int, names=()) -> dict[str, list[list[int]]]:
    """Token ids by name of the batch; `names` limits them."""
    from treespec_jax import LLM
    from treespec_jax.commands.prompts import STORIES

    prompts = ["the", *STORIES[:3], " ".join(STORIES)]
    target, draft = pair
    speculative = None
    if case.speculative:
        speculative = dict(case.speculative, method="draft_model", model=draft)
    llm = LLM(
        target, speculative=speculative, max_batch=batch, max_len=256, page_size=16
    )
    return {
        name: [c.token_ids for c in llm.generate(prompts, params)]
        for name, params in batches(case.penalised)
        if not names or name in names
    }


def load_pair():
    """Target and drafter."""
    import treespec_jax
    from treespec_jax.checkpoints import load

    bundled = Path(treespec_jax.__file__).parent / "bundled"
    return load(bundled / "target", "float32"), load(bundled / "draft", "float32")


def main(write: bool) -> int:
    pair = load_pair()
    found = {}
    wanted = {} if write else json.loads(FILE.read_text())
    differ = 0
    for case in cases():
        for batch in BATCHES:
            name = f"{case.name} batch {batch}"
            found[name] = run(case, pair, batch)
            same = write or found[name] == wanted[name]
            differ += not same
            print(name, "ok" if same else "DIFFERS", flush=True)
    if write:
        lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return differ


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
