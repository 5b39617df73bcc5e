"""Engines over tiny models, and requests run to their end."""

from __future__ import annotations

import dataclasses

from treespec_jax.acceptance import rules
from treespec_jax.acceptance.cascade import Cascade
from treespec_jax.config import EngineConfig, SamplingParams, SpeculativeConfig
from treespec_jax.drafting.draft_model import DraftModel
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.speculation import PLAIN, Speculation
from treespec_jax.trees import shapes


def speculate(
    draft,
    tree: str,
    rule: str = "exact",
    *,
    tau: float = 0.5,
    proposal: str = "",
    cascade: Cascade | None = None,
    **more,
) -> Speculation:
    """A draft model under a rule; `more` are further settings of the rule."""
    shape = shapes.parse(tree)
    made = rules.make(SpeculativeConfig(rule=rule, **more))
    if shape.depth == 0:
        return dataclasses.replace(PLAIN, rule=made)
    return Speculation(DraftModel(draft, tau), (shape,), made, proposal, cascade)


def build(target, draft, tree, batch=1, page=64, steps=1, **sizes) -> Engine:
    """An engine under the exact rule; `eos_ids` end its texts, `costs` are of steps."""
    eos_ids, costs = sizes.pop("eos_ids", ()), sizes.pop("costs", None)
    config = EngineConfig(
        max_batch=batch,
        max_len=sizes.pop("max_len", 128),
        page_size=page,
        steps_per_dispatch=steps,
        prefill_chunks=(16,),
        **sizes,
    )
    return Engine(target, config, speculate(draft, tree), eos_ids, costs)


def serve(engine, requests) -> list[Request]:
    """Runs requests to their end."""
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.advance()
    return requests


def run(engine, prompts, params: SamplingParams) -> list[Request]:
    """Runs prompts with seeds 0, 1, …; returns their requests."""
    return serve(
        engine,
        [
            Request(prompt, dataclasses.replace(params, seed=i))
            for i, prompt in enumerate(prompts)
        ],
    )
