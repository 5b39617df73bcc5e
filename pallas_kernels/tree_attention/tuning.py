"""Search over the block sizes of the TPU kernel.

Without a device a candidate is ranked by the compiler's cycles per row of prefix, those
of half-filled last blocks included, or by the time that memory takes to deliver the
row, whichever is longer; with one, by measured time. Stores and loads of registers that
spill are in the schedule, but the room that they take from others at run time is not
known: each counts some cycles more.

Trials are kept in a file as they end, so that a search goes on where it stopped, also
after a candidate that ended the process.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from pallas_kernels.tree_attention import estimate
from pallas_kernels.tree_attention.api import tree_attention
from pallas_kernels.tree_attention.operands import Operands, Shape
from pallas_kernels.tree_attention.sizes import BlockSizes
from pallas_kernels.tree_attention.spec import AttentionSpec

_SPACE = {
    "block_rows": (256, 384, 512, 1024),
    "unroll": (1, 2, 4, 8),
    "rows": (64, 128, 256),
}
# Query rows in flight at once, `unroll` heads of a tile each: more want more registers
# than there are. More of them in long blocks take more vector memory than a v4 has, and
# heads in turn fewer registers.
_IN_FLIGHT, _IN_FLIGHT_IF_ROOMY = 256, 1024
_ROOMY = 32 * 2**20
# Cycles more for each register that is stored or loaded again, as many as a load takes.
_SPILL = 4
# Estimates this close to the best count as equal; then the simplest program wins.
_TIE = 0.01


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate's result.

    Attributes:
      sizes: the candidate.
      cost: what to rank by: cycles (estimate) or seconds (measured); None: refused.
      figures: what the cost comes from, or the refusal.
    """

    sizes: BlockSizes
    cost: float | None
    figures: dict[str, Any]


def candidates(rows: int) -> Iterator[BlockSizes]:
    """Block sizes worth trying for a class of calls, each program once."""
    for values in itertools.product(*_SPACE.values()):
        given = dict(zip(_SPACE, values, strict=True))
        if given["rows"] > max(rows, min(_SPACE["rows"])):
            continue  # the whole of the rows is one tile already
        in_flight = given["unroll"] * min(given["rows"], rows)
        if in_flight <= _IN_FLIGHT:
            yield BlockSizes(**given)
        if given["unroll"] > 2 and in_flight <= _IN_FLIGHT_IF_ROOMY:
            for in_turn in (False, True):
                yield BlockSizes(**given, vmem_bytes=_ROOMY, in_turn=in_turn)


def estimate_trial(topology: str, shape: Shape, rows: int, sizes: BlockSizes) -> Trial:
    """Ranks by the compiler's figures.

    Raises:
      ValueError: an unknown topology.
    """
    kind = aot.device_kind(topology)
    operands, spec = _call(shape, rows, sizes)
    function = functools.partial(tree_attention, spec=spec)
    try:
        report = aot.compile_for(topology, function, operands).report
        kernel = report.kernel("tree_attention")
        cost = estimate.prefix_cost(kernel, kind, operands, spec)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        return Trial(sizes, None, {"refused": str(error).strip().splitlines()[0]})
    figures = dataclasses.asdict(cost)
    # A slot's last block is computed whole and is half full on average.
    cycles = cost.cycles + _SPILL * cost.spills
    cycles *= 1 + sizes.block_rows / (2 * shape.prefix)
    return Trial(sizes, max(cycles, cost.stream_cycles), figures)


def measure_trial(shape: Shape, rows: int, sizes: BlockSizes, rounds: int = 7) -> Trial:
    """Ranks by the median time of a call on this machine's TPU, slots full."""
    operands, spec = _call(shape, rows, sizes)
    key, random = jax.random.key(0), jax.jit(jax.random.normal, static_argnums=(1, 2))

    def normal(x):
        return random(key, x.shape, x.dtype)

    table, mask = operands.page_table, operands.tree_mask
    operands = Operands(
        queries=normal(operands.queries),
        kv_pages=normal(operands.kv_pages),
        page_table=1 + jnp.arange(table.size, dtype=jnp.int32).reshape(table.shape),
        lengths=jnp.full(shape.slots, shape.prefix, jnp.int32),
        tree_kv=normal(operands.tree_kv),
        tree_mask=jnp.broadcast_to(
            jnp.tril(jnp.ones(mask.shape[1:], bool)), mask.shape
        ),
    )
    function = jax.jit(functools.partial(tree_attention, spec=spec))
    seconds = []
    try:
        for _ in range(rounds + 1):
            begun = time.perf_counter()
            jax.block_until_ready(function(operands))
            seconds.append(time.perf_counter() - begun)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        return Trial(sizes, None, {"refused": str(error).strip().splitlines()[0]})
    cost = statistics.median(seconds[1:])
    return Trial(sizes, cost, {"seconds": seconds[1:]})


def best(trials: Sequence[Trial]) -> Trial | None:
    """The cheapest.

    Args:
      trials: the default's first: it stays unless another is cheaper by more than a
        tie. Among equal others, as where memory bounds all, the one with the fewest
        cycles, and then the least unrolled.
    """
    done = [trial for trial in trials if trial.cost is not None]
    if not done:
        return None
    limit = (1 + _TIE) * min(trial.cost for trial in done)

    def rank(trial):
        sizes, figures = trial.sizes, trial.figures
        cycles = figures.get("cycles", 0) + _SPILL * figures.get("spills", 0)
        return (
            trial is not trials[0],
            cycles,
            sizes.unroll,
            sizes.block_rows,
            sizes.rows,
        )

    return min((t for t in done if t.cost <= limit), key=rank)


class Journal:
    """Trials on disk, a JSON line each.

    Args:
      path: of the file; made when the first trial ends.
    """

    def __init__(self, path: Path):
        self._path = path
        self._done: dict[str, Trial] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the process ended while it wrote
            sizes = BlockSizes(**entry["sizes"])
            trial = Trial(sizes, entry["cost"], entry["figures"])
            self._done[json.dumps(entry["key"])] = trial

    def run(self, key: Sequence[Any], trial) -> Trial:
        """What `trial()` gives, or gave when this key last ran.

        A key whose trial never ended, because it took the process with it, counts as
        refused from then on.
        """
        name = json.dumps(list(key))
        if name not in self._done:
            sizes = BlockSizes(**key[-1])
            self._write(key, Trial(sizes, None, {"refused": "it ended the process"}))
            self._write(key, trial())
        return self._done[name]

    def _write(self, key, trial: Trial) -> None:
        entry = {"key": list(key), **dataclasses.asdict(trial)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._done[json.dumps(list(key))] = trial


def _call(shape: Shape, rows: int, sizes: BlockSizes) -> tuple[Operands, AttentionSpec]:
    """An abstract call with `rows` query rows per key/value head."""
    spec = AttentionSpec(
        scale=shape.head_dim**-0.5, implementation="tpu", block_sizes=sizes
    )
    return shape.operands(max(1, rows // shape.group)), spec
