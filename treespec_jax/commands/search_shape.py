"""Searches the best fixed tree for a pair of models on this machine.

Acceptance by depth and rank is counted with a wide tree, and the costs of a step's
parts are measured. --output is a file that --tree=file:PATH reads; it also holds the
best tree of every number of nodes. The tree found then runs on the same prompts; each
half of them is predicted by the other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl.flags import DEFINE_bool, DEFINE_enum, DEFINE_integer, DEFINE_string

from treespec_jax.checkpoints.files import check_writable, write_whole
from treespec_jax.checks import check_int
from treespec_jax.commands import runtime, shape_study
from treespec_jax.errors import UserError
from treespec_jax.measurement import shape_tables
from treespec_jax.trees import paths
from treespec_jax.trees.shapes import MAX_NODES, ROOT_ONLY
from treespec_jax.trees.topology import Topology
from treespec_jax.tuning import search
from treespec_jax.tuning.search import Candidate

_REMEDY = "choose another --output"


def define() -> None:
    shape_study.define()
    DEFINE_integer("nodes", 63, "drafted nodes, at most")
    DEFINE_integer("depth", 8, "levels, at most")
    words = "speed: best for this machine; tokens: most tokens per step, costs aside"
    DEFINE_enum("goal", "speed", ("speed", "tokens"), words)
    DEFINE_integer("trunk", 0, "levels at the top of one node each")
    words = "equally many children at one depth, and whole tiles of the TPU kernel: "
    words += "T times query heads per key/value head is a multiple of --tile"
    DEFINE_bool("uniform", False, words)
    DEFINE_integer("tile", 16, "rows of a tile, for --uniform; 1: any T")
    DEFINE_bool("check", True, "compare the tree found with its prediction")
    DEFINE_string("output", "", "JSON file to write")


def main(given) -> None:
    check_int("nodes", given.nodes, 1)
    check_int("depth", given.depth, 1)
    check_int("tile", given.tile, 1)
    check_int("trunk", given.trunk, 0)
    if given.nodes >= MAX_NODES:
        raise UserError(f"--nodes={given.nodes}: {MAX_NODES - 1} fit at most")
    if given.trunk > min(given.nodes, given.depth):
        raise UserError(
            f"--trunk={given.trunk} does not fit --nodes={given.nodes} and "
            f"--depth={given.depth}; lower it"
        )
    if not given.output:
        raise UserError("no output file: give --output=FILE.json")
    output = Path(given.output).expanduser()
    check_writable(output, _REMEDY)
    job = shape_study.make(given, [])

    # Heavy imports only now, so that a bad flag answers at once.
    runtime.set_up(given.compilation_cache)
    results = run(job, given)
    write_whole(output, (json.dumps(results, indent=2) + "\n").encode(), _REMEDY)
    print(shape_tables.found(results))
    print(f"\nwrote {output}; use it as --tree=file:{output}")


def run(job: shape_study.Job, given) -> dict[str, Any]:
    """Counts, prices, searches and checks; plain values for JSON.

    Raises:
      UserError: no tree of the kind asked for, or as `shape_study.measure`.
    """
    bench = shape_study.measure(job)
    costs = bench.costs(given.nodes + 1) if given.goal == "speed" else None
    candidates = list(_candidates(job, given, bench.acceptance))
    if not candidates:
        raise UserError(
            f"no regular tree of --nodes={given.nodes} fills tiles of "
            f"--tile={given.tile}; raise --nodes or lower --tile"
        )
    if costs is None:
        candidates.sort(key=lambda one: (-one.tokens, one.nodes))
    else:
        # No tree at all is a candidate too.
        plain = Candidate(ROOT_ONLY.topology, 1.0)
        candidates = search.priced([*candidates, plain], costs)
    best = candidates[0]
    name = paths.text_of(best.topology)
    measured = bench.compare([name]) if given.check else {}
    limits = "nodes", "depth", "goal", "trunk", "uniform", "tile"
    return {
        "tree": name,
        **_values(best),
        "held_out": bench.held_out(best.topology),
        "tokens_error": shape_tables.standard_error(best.topology, bench.acceptance),
        "measured": measured.get(name, measured.get(shape_study.PLAIN)),
        "by_nodes": [_values(one) for one in _best_by_nodes(candidates)],
        "search": {limit: given[limit].value for limit in limits},
        **job.as_dict(bench.llms[shape_study.PROBE]),
        "acceptance": dataclasses.asdict(bench.acceptance),
        "costs": None if costs is None else dataclasses.asdict(costs),
    }


def _candidates(job: shape_study.Job, given, acceptance) -> Sequence[Candidate]:
    if not given.uniform:
        return list(
            search.best_trees(acceptance, given.nodes, given.depth, given.trunk)
        )
    from treespec_jax.checkpoints import describe

    config = describe(job.settings.target).config
    group = config.num_heads // config.num_kv_heads
    found = search.regular_trees(acceptance, given.nodes, given.depth)
    return [
        one
        for one in found
        if one.topology.num_nodes * group % given.tile == 0
        and _trunk(one.topology) >= given.trunk
    ]


def _trunk(topology: Topology) -> int:
    """Levels at the top of one node each."""
    wide = (d for d in range(1, topology.depth + 1) if len(topology.level(d)) > 1)
    return next(wide, topology.depth + 1) - 1


def _best_by_nodes(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of each number of nodes the first."""
    best: dict[int, Candidate] = {}
    for one in candidates:
        best.setdefault(one.nodes, one)
    return [best[nodes] for nodes in sorted(best)]


def _values(one: Candidate) -> dict[str, Any]:
    return {
        "nodes": one.nodes,
        "depth": one.topology.depth,
        "tree": paths.text_of(one.topology),
        "tokens": one.tokens,
        "seconds": one.seconds,
        "speedup": one.speedup,
    }
