"""The search over the TPU kernel's block sizes: trials, a table, and the choice."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from pallas_kernels import aot
from pallas_kernels.tree_attention import tuning
from pallas_kernels.tree_attention.sizes import CLASSES, SIZES_FILE, choose, save
from pallas_kernels.tree_attention.tuning import Shape
from treespec_jax.errors import UserError
from treespec_jax.measurement.tables import markdown


def classes(names: Sequence[str] | None) -> tuple[int, ...]:
    """Classes of rows, ascending; None: all that calls are sorted into.

    Raises:
      UserError: not a class.
    """
    if names is None:
        return CLASSES
    known = [str(rows) for rows in CLASSES]
    if not set(names) <= set(known):
        raise UserError(f"--rows={','.join(names)} must be of {', '.join(known)}")
    return tuple(sorted({int(name) for name in names}))


def run(
    call: Shape, topologies: Sequence[str], rows: Sequence[int], work: Path, write: bool
) -> None:
    """Tries all candidates of all classes, for each topology or on this device.

    Args:
      call: shape of the calls.
      topologies: to rank for by the compiler; none: by time on this machine's TPU.
      rows: classes of query rows per key/value head.
      work: folder of finished trials.
      write: replace the data file's entries with what beats the default.

    Raises:
      UserError: no TPU or no compiler, or a topology that is unknown.
    """
    journal = tuning.Journal(work / "trials.jsonl")
    chosen: dict[str, dict[int, tuning.BlockSizes | None]] = {}
    for name, kind, attempt in _trials_of(call, topologies):
        table = [("rows", "block_rows", "unroll", "tile", "cost", "default", "refused")]
        for count in rows:
            trials = []
            given = [choose(None, count), *tuning.candidates(count)]
            for sizes in tqdm(given, desc=f"{name} {count}", leave=False):
                key = name, dataclasses.asdict(call), count, dataclasses.asdict(sizes)
                trial = functools.partial(attempt, count, sizes)
                trials.append(journal.run(key, trial))
            found = tuning.best(trials)
            if found is None:
                raise UserError(
                    f"{name}: the kernel takes no candidate at {count} rows: "
                    f"{trials[0].figures['refused']}"
                )
            better = None if found is trials[0] else found.sizes
            chosen.setdefault(kind, {})[count] = better
            refused = sum(trial.cost is None for trial in trials)
            sizes = found.sizes.block_rows, found.sizes.unroll, found.sizes.rows
            costs = _cost(found), _cost(trials[0]), f"{refused} of {len(trials)}"
            table.append((str(count), *map(str, sizes), *costs))
        what = "measured seconds" if not topologies else "compiler's estimate, cycles"
        unit = "per call" if not topologies else "per 128 rows of prefix and head"
        print(f"{kind}: cost is {what} {unit}\n\n{markdown(table)}\n")
    if write:
        save(chosen)
        print(f"written to {SIZES_FILE}", file=sys.stderr)


def _cost(trial: tuning.Trial) -> str:
    return "refused" if trial.cost is None else f"{trial.cost:.3g}"


def _trials_of(call: Shape, topologies: Sequence[str]):
    """(name, device kind, function of a trial) of every topology or this device."""
    if not topologies:
        device = jax.devices()[0]
        if device.platform != "tpu":
            raise UserError(
                f"--measure needs a TPU, this machine has {device.device_kind}; leave "
                "it out to rank by the compiler's figures"
            )
        kind = device.device_kind
        yield kind, kind, functools.partial(tuning.measure_trial, call)
        return
    try:
        aot.prepare()
        kinds = [aot.device_kind(topology).kind for topology in topologies]
    except (aot.CompilerUnavailable, ValueError) as error:
        raise UserError(str(error)) from None
    for topology, kind in zip(topologies, kinds, strict=True):
        yield topology, kind, functools.partial(tuning.estimate_trial, topology, call)
