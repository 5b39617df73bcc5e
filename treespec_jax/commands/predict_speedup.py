"""Predicts tokens per step and speed-up of fixed trees, beside what is measured.

Acceptance by depth and rank is counted with a wide tree, and the costs of a step's
parts are measured on this machine. Then --shapes run on the same prompts; each half of
the prompts is predicted by the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from absl.flags import DEFINE_list

from treespec_jax.commands import flags, runtime, shape_study
from treespec_jax.errors import UserError
from treespec_jax.measurement import shape_tables
from treespec_jax.measurement.output import Study
from treespec_jax.trees import shapes


def define() -> None:
    shape_study.define()
    DEFINE_list("shapes", "chain:3,chain:5,regular:3x2x1", "fixed trees to predict")
    flags.define("output")


def main(given) -> None:
    trees = list(dict.fromkeys(given.shapes))
    for tree in trees:
        if shapes.parse(tree).depth == 0:
            raise UserError(
                f"--shapes={tree}: plain decoding is measured anyway; leave it out"
            )
    if not trees:
        raise UserError("nothing to predict: --shapes is empty")
    job = shape_study.make(given, trees)

    # Heavy imports only now, so that a bad flag answers at once.
    runtime.set_up(given.compilation_cache)
    Study(lambda: measure(job, trees), shape_tables.predictions).carry_out(given.output)


def measure(job: shape_study.Job, trees: list[str]) -> dict[str, Any]:
    """Predictions and measurements, as plain values for JSON.

    Raises:
      UserError: an unreadable checkpoint, or settings that do not fit together.
    """
    bench = shape_study.measure(job)
    topologies = {tree: shapes.parse(tree).topology for tree in trees}
    largest = max(topology.num_nodes for topology in topologies.values())
    costs = bench.costs(largest)
    measured = bench.compare(trees)
    return {
        **job.as_dict(bench.llms[shape_study.PROBE]),
        "acceptance": dataclasses.asdict(bench.acceptance),
        "costs": dataclasses.asdict(costs),
        "plain": measured[shape_study.PLAIN]
        | {"predicted": 1e3 * costs.step(shapes.ROOT_ONLY.topology)},
        "figures": [
            {
                "shape": tree,
                **shape_tables.predict(topology, bench.acceptance, costs),
                "tokens": bench.held_out(topology),
                "speedup": costs.speedup(topology, bench.held_out(topology)),
                "measured": measured[tree],
            }
            for tree, topology in topologies.items()
        ],
    }
