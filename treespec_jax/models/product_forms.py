"""Forms of a product, and how many rows it takes at once.

On a CPU the cost of a product does not grow evenly with its rows: libraries change
their method at some counts, and not at the same ones on all processors. `blocks` pads
rows and cuts them into blocks accordingly, by a table per weight type. `measure` fills
the table of a type for this machine; without, a built-in one only pads.

| weights | rows | form |
|---|---|---|
| one type of both | any | a product |
| uint8, 128 too large | int8 | a product of both types, corrected |
| int8, uint8 or bfloat16 | one, not short | a sum, where it was measured to be quick |
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from treespec_jax.models import mixed_product, one_row

# Weight type -> cost by row count, of no machine in particular. On a CPU 5 to 7 float32
# rows cost a fifth more than 8, 9 to 15 up to 1.4 times 16, and 17 to 31 as much as 32;
# one bfloat16 or int8 row goes to a loop that takes ten times as long as the product of
# two.
_BUILT_IN = {
    "float32": {1: 1.0, 2: 1.3, 3: 1.35, 4: 1.4, 8: 1.6, 16: 1.9, 32: 2.9},
    "bfloat16": {2: 1.0, 4: 1.0, 8: 1.0, 16: 1.1, 32: 2.2},
    "int8": {2: 1.0, 4: 1.0, 8: 1.1, 16: 1.4, 32: 2.8},
    "uint8": {2: 1.0, 4: 1.1, 8: 1.2, 16: 1.5, 32: 3.5},
}
# Two forms of the same weights.
INTEGERS = ("int8", "uint8")
_measured: dict[str, dict[int, float]] = {}

# Row counts to try: 15 and 16 go different ways in one library.
_ROWS = (1, 2, 4, 8, 12, 15, 16, 24, 32)
# Those by which types are compared.
_FEW_ROWS = (2, 4, 8, 16)
_WIDTH, _BYTES, _TIMES = 768, 24 << 20, 7
# Raised when the tables of earlier releases no longer hold.
_EDITION = 3
# Seconds after which no further round begins.
_PATIENCE = 1.0
# Blocks must win by this factor.
_CLEAR = 0.9
# Costs that are the same but for noise.
_NEAR = 1.05


def product(weight: jax.Array, x: jax.Array, sums) -> jax.Array:
    """[*out, R] of [*out, I] and [I, R], or of G of each.

    Args:
      weight: in the dtype of `x`; or uint8, int8 with 128 added, and `x` int8.
      x: the rows; as many as `blocks` says.
      sums: dtype of the result.
    """
    if x.ndim == 3 and x.shape[0] == 1:
        return product(weight[0], x[0], sums)[None]
    if x.shape[-1] == 1 and x.dtype in (jnp.int8, jnp.bfloat16):
        if one_row.takes(weight, x):
            return one_row.product(weight, x)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
        return product(weight, x, sums)[..., :1]
    if weight.dtype == jnp.uint8:
        return mixed_product.signed_product(weight, x)
    return whole(weight, x, sums)


def whole(weight: jax.Array, x: jax.Array, sums) -> jax.Array:
    """`product` of arrays of one type, by XLA: the one form of all devices."""
    if x.ndim == 3 and x.shape[0] == 1:
        return whole(weight[0], x[0], sums)[None]
    batch = ((0,), (0,)) if x.ndim == 3 else ((), ())
    return lax.dot_general(
        weight,
        x,
        (((weight.ndim - 1,), (x.ndim - 2,)), batch),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=sums,
    )


def blocks(rows: int, dtype) -> tuple[int, ...]:
    """Sizes of the blocks that a product of some rows is cut into.

    Their sum is at least `rows`; what is over in the last one is padding.

    Args:
      rows: R.
      dtype: of the weights.
    """
    name = np.dtype(dtype).name
    if name in _measured:
        return cut(rows, _measured[name])
    return (padded(rows, _BUILT_IN.get(name, {})),)


def padded(rows: int, table: Mapping[int, float]) -> int:
    """The row count of a table that is the cheapest with so many rows or more.

    More rows than the table knows are left as they are.

    Args:
      rows: R.
      table: cost by row count.
    """
    large = {size: cost for size, cost in table.items() if size >= rows}
    least = min(large.values(), default=0.0)
    return min((s for s, cost in large.items() if cost <= _NEAR * least), default=rows)


def cut(rows: int, table: Mapping[int, float]) -> tuple[int, ...]:
    """The blocks of least cost together, the largest first; arguments as of `padded`.

    One block is taken unless several are clearly cheaper: each reads the weights again.
    """
    single = padded(rows, table)
    if single not in table:
        return (single,)
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for count in range(1, rows + 1):
        rests = ((best[max(0, count - size)], size, table[size]) for size in table)
        best.append(min((done + cost, (*s, size)) for (done, s), size, cost in rests))
    cost, sizes = best[rows]
    clear = cost < _CLEAR * table[single]
    return tuple(sorted(sizes, reverse=True)) if clear else (single,)


def measure(dtype, folder: Path | None = None) -> dict[int, float]:
    """Measures this machine's table of a weight type, once; in some seconds.

    Only for products on a CPU. What an earlier process measured on this machine is
    read again.

    Args:
      dtype: of the weights.
      folder: where the table is kept; None: in this process only.

    Returns:
      milliseconds by row count.
    """
    name = np.dtype(dtype).name
    if name not in _BUILT_IN:
        return {}
    # Forms that are compared are timed in turn.
    names = INTEGERS if name in INTEGERS else (name,)
    return recorded(names, lambda: _timed(names), _machine(), folder)[name]


def recorded(
    names: Sequence[str],
    timed: Callable[[], Mapping[str, dict[int, float]]],
    machine: str,
    folder: Path | None,
) -> dict[str, dict[int, float]]:
    """Tables of some names: of this process, or kept in a folder, or measured now.

    Args:
      names: of the tables; measured together or not at all.
      timed: measures them.
      machine: what they depend on, in a form that a file's name can have.
      folder: where tables are kept; None: in this process only.

    Returns:
      milliseconds by name and row count.
    """
    file = folder and folder / f"product_forms-{machine}.json"
    kept: dict[str, dict[str, float]] = {}
    if names[0] not in _measured:
        with contextlib.suppress(OSError, LookupError, ValueError, AttributeError):
            kept = dict(json.loads(file.read_text("utf-8")))
            tables = {
                name: {int(rows): float(ms) for rows, ms in kept[name].items()}
                for name in names
            }
            _measured.update(tables)
    if names[0] not in _measured:
        _measured.update(timed())
        with contextlib.suppress(OSError, AttributeError):
            kept |= {name: _measured[name] for name in names}
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(kept), "utf-8")
            partial.replace(file)
    return {name: _measured[name] for name in names}


def machine_key(hardware: str) -> str:
    """What a table's file is named by: the hardware and the version of jax."""
    return f"{zlib.crc32(f'{hardware} {jax.__version__}'.encode()):08x}"


def _machine() -> str:
    """Names what the costs depend on: processor, cores and jax."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        numbers = [line.partition(":")[2].strip() for line in lines[:20]]
        model = " ".join(itertools.islice(filter(None, numbers), 1, 6))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return machine_key(f"{model} {cores or os.cpu_count()} {_EDITION}")


def _timed(names: Sequence[str]) -> dict[str, dict[int, float]]:
    """Milliseconds by weight type and row count, all types timed in turn.

    Only the type that is the quickest by few row counts is timed with all of them.
    One row is the same sum in all types that are compared, and timed once.
    """
    first = _FEW_ROWS if len(names) > 1 else _ROWS
    tables = _rounds([(name, rows) for name in names for rows in first])
    quick = min(tables, key=lambda name: sum(tables[name].values()))
    if rest := [(quick, rows) for rows in _ROWS if rows not in first]:
        tables[quick] |= _rounds(rest)[quick]
    one = {1: tables[quick][1]} if 1 in tables[quick] else {}
    return {name: dict(sorted({**one, **tables[name]}.items())) for name in names}


def _rounds(keys: Sequence[tuple[str, int]]) -> dict[str, dict[int, float]]:
    """The least milliseconds of some rounds, by weight type and row count."""
    names = dict.fromkeys(name for name, _ in keys)
    # A compiler leaves Python's lock to others.
    with ThreadPoolExecutor(len(names) + 1) as pool:
        weights = {name: _weight(name) for name in names}
        compiled = pool.map(lambda key: _program(*key, weights[key[0]]), keys)
        runs = dict(zip(keys, compiled, strict=True))
    for run in runs.values():
        jax.block_until_ready(run())
    best, began = dict.fromkeys(runs, math.inf), time.perf_counter()
    for _ in range(_TIMES):
        for key, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            best[key] = min(best[key], (time.perf_counter() - start) * 1e3)
        # A type that a processor has no instructions for may take long.
        if time.perf_counter() - began > _PATIENCE:
            break
    return {
        name: {rows: ms for (kind, rows), ms in best.items() if kind == name}
        for name in names
    }


def _weight(name: str) -> jax.Array:
    """Of a weight type: more than a second-level cache holds."""
    numbers = np.random.default_rng(0).integers(0, 99, 1 << 20, np.int8)
    shape = _BYTES // (_WIDTH * np.dtype(name).itemsize), _WIDTH
    return jnp.asarray(np.resize(numbers, shape), name)


def _program(name: str, rows: int, weight: jax.Array) -> Callable:
    """A product of a weight and so many rows, compiled."""
    integers = name in INTEGERS
    sums = jnp.int32 if integers else jnp.float32

    @jax.jit
    def run(weight, x, steps):
        """In a loop, as in a dispatch: XLA moves out of it what no step changes."""

        def step(turn, carry):
            x, _ = carry
            y = product(weight, x, sums)
            # The next step's rows depend on this one's, as far as XLA can know.
            row_R = lax.dynamic_index_in_dim(y, turn, keepdims=False)
            return x + (row_R < -(2**30)).astype(x.dtype), y

        empty = jnp.zeros((weight.shape[0], rows), sums)
        return lax.fori_loop(0, steps, step, (x, empty))

    x = jnp.ones((_WIDTH, rows), "int8" if integers else name)
    args = weight, x, np.int32(1)
    return functools.partial(run.lower(*args).compile(), *args)
