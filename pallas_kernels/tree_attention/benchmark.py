"""Time of tree attention over a long prefix, beside other attention and the memory.

Every candidate runs in interleaved rounds of one process: this operation, XLA's
attention over a prefix gathered from the same pages, and `jax.nn.dot_product_attention`
over a dense cache (which need not read pages, and so is the kinder baseline). The
ceilings are measured too: a copy on the device and a matrix product.

Letters as in `operands`; S rows of prefix.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.tree_attention.api import tree_attention
from pallas_kernels.tree_attention.operands import Operands
from pallas_kernels.tree_attention.spec import AttentionSpec

KERNEL, GATHERED, DENSE, CUDNN = "tree_attention", "xla gathered", "nn xla", "nn cudnn"
METHODS = (KERNEL, GATHERED, DENSE, CUDNN)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are one layer of Llama 3 8B.

    Attributes:
      slots, prefix: texts, and tokens of prefix of each.
      nodes: tree sizes T; each is compared with the first.
      heads, kv_heads, head_dim, page: shape of the layer and its cache.
      dtype: name of the numbers' type.
      methods: names out of METHODS; one that cannot run here is reported as such.
      implementation: of the operation; None: by platform.
      rounds: samples per candidate.
      calls: calls per sample, one behind the other in one program.
      copy_bytes: size of the array whose copy gives the bandwidth.
      matrix: rows of the square matrices whose product gives the arithmetic rate.
      seed: of the random inputs.
    """

    slots: int = 8
    prefix: int = 8192
    nodes: tuple[int, ...] = (1, 16, 32, 64)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page: int = 128
    dtype: str = "bfloat16"
    methods: tuple[str, ...] = METHODS
    implementation: str | None = None
    rounds: int = 7
    calls: int = 20
    copy_bytes: int = 1 << 30
    matrix: int = 8192
    seed: int = 0

    def __post_init__(self):
        for name in (
            "slots",
            "prefix",
            "heads",
            "kv_heads",
            "head_dim",
            "page",
            "rounds",
            "calls",
            "copy_bytes",
            "matrix",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: want at least 1")
        if not self.nodes or min(self.nodes) < 1:
            raise ValueError(f"nodes={self.nodes}: want one or more positive numbers")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}"
            )
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype={self.dtype}: want bfloat16, float16 or float32")
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"no method {method!r}; choose from {METHODS}")

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def least_bytes(self, T: int) -> int:
        """Bytes of one call if the prefix, the tree, and what goes in and out are each
        moved once."""
        size = jnp.dtype(self.dtype).itemsize
        rows = self.slots * (self.prefix + T) * self.kv_heads * 2
        return size * self.head_dim * (rows + 2 * self.slots * T * self.heads)

    def operations(self, T: int) -> int:
        """Multiplications and additions of both products of one call."""
        return 4 * self.slots * T * self.heads * (self.prefix + T) * self.head_dim


def random_tree(rng: np.random.Generator, T: int) -> np.ndarray:
    """Ancestors, self included, of a random tree: bool [T, T]."""
    ancestors = np.eye(T, dtype=bool)
    for node in range(1, T):
        ancestors[node] |= ancestors[rng.integers(0, node)]
    return ancestors


def make_operands(settings: Settings) -> dict[int, Operands]:
    """Random operands of a call for each T; all read the same pages."""
    rng = np.random.default_rng(settings.seed)
    B, K, H = settings.slots, settings.kv_heads, settings.head_dim
    max_pages = -(-settings.prefix // settings.page)
    P = B * max_pages + 1
    shapes = [(P, K, 2, settings.page, H)]
    for T in settings.nodes:
        shapes += [(B, T, settings.heads, H), (B, K, 2, T, H)]

    @jax.jit
    def numbers():
        keys = jax.random.split(jax.random.key(settings.seed), len(shapes))
        pairs = zip(keys, shapes, strict=True)
        return [jax.random.normal(key, s, settings.dtype) for key, s in pairs]

    kv_pages, *rest = numbers()
    masks = [
        jnp.asarray(np.stack([random_tree(rng, T) for _ in range(B)]))
        for T in settings.nodes
    ]
    table = rng.permutation(np.arange(1, P)).reshape(B, max_pages)
    table = jnp.asarray(table, jnp.int32)
    lengths = jnp.full((B,), settings.prefix, jnp.int32)
    return {
        T: Operands(
            queries=queries,
            kv_pages=kv_pages,
            page_table=table,
            lengths=lengths,
            tree_kv=tree_kv,
            tree_mask=mask,
        )
        for T, queries, tree_kv, mask in zip(
            settings.nodes, rest[::2], rest[1::2], masks, strict=True
        )
    }


def gathered_attention(settings: Settings, operands: Operands) -> jax.Array:
    """Plain attention by XLA: gathers the prefix, then two products and a softmax."""
    B, T, N, H, K, G, _ = operands.dims
    q = operands.queries
    kv_BK2SH = _gather(operands)
    kv_BK2SH = jnp.concatenate([kv_BK2SH, operands.tree_kv], axis=3)
    S = kv_BK2SH.shape[3] - T
    seen_BS = jnp.arange(S)[None] < operands.lengths[:, None]
    seen_BTS = jnp.broadcast_to(seen_BS[:, None], (B, T, S))
    seen_BTS = jnp.concatenate([seen_BTS, operands.tree_mask], axis=2)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = {"preferred_element_type": jnp.float32, "precision": precision}
    q_BTKGH = q.reshape(B, T, K, G, H)
    s_BKGTS = jnp.einsum("btkgh,bksh->bkgts", q_BTKGH, kv_BK2SH[:, :, 0], **product)
    s_BKGTS = jnp.where(seen_BTS[:, None, None], s_BKGTS * settings.scale, -jnp.inf)
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkgts,bksh->btkgh", p_BKGTS, kv_BK2SH[:, :, 1], **product)
    return out.reshape(q.shape).astype(q.dtype)


def _gather(operands: Operands) -> jax.Array:
    """The prefix's rows [B, K, 2, S, H]."""
    _, K, _, page, H = operands.kv_pages.shape
    B, pages = operands.page_table.shape
    rows = operands.kv_pages[operands.page_table].transpose(0, 2, 3, 1, 4, 5)
    return rows.reshape(B, K, 2, pages * page, H)


Candidate = tuple[Callable, tuple]


def candidate(settings: Settings, operands: Operands, method: str) -> Candidate:
    """A function of (queries, *rest) -> [B, T, N, H], and these arguments."""
    if method in (KERNEL, GATHERED):
        spec = AttentionSpec(
            scale=settings.scale,
            implementation=settings.implementation,
            device_kind=jax.devices()[0].device_kind,
        )

        def paged(queries, rest):
            given = dataclasses.replace(rest, queries=queries)
            if method == KERNEL:
                return tree_attention(given, spec)
            return gathered_attention(settings, given)

        rest = dataclasses.replace(operands, queries=None)
        return paged, (operands.queries, rest)

    T, mask = operands.dims.T, operands.tree_mask

    @jax.jit
    def dense():
        kv = _gather(operands)[:, :, :, : settings.prefix]
        kv = jnp.concatenate([kv, operands.tree_kv], axis=3).transpose(2, 0, 3, 1, 4)
        rows = jnp.ones((settings.slots, 1, T, settings.prefix), bool)
        return kv, jnp.concatenate([rows, mask[:, None]], axis=3)

    (keys, values), seen = dense()  # [B, S + T, K, H] each, [B, 1, T, S + T]
    implementation = {DENSE: "xla", CUDNN: "cudnn"}[method]

    def attention(q, keys, values, seen=None):
        return jax.nn.dot_product_attention(
            q,
            keys,
            values,
            mask=seen,
            scale=settings.scale,
            implementation=implementation,
        )

    q = operands.queries
    # One node sees everything: no mask, which lets cuDNN take its fastest way.
    return attention, (q, keys, values) if T == 1 else (q, keys, values, seen)


def repeated(function: Callable, calls: int) -> Callable:
    """`calls` calls in one program, each with the last one's result as its queries."""

    def many(q, *rest):
        def body(_, q):
            # Else what does not depend on q would be computed once for all calls.
            return function(*lax.optimization_barrier((q, *rest)))

        return lax.fori_loop(0, calls, body, q)

    return jax.jit(many)


class Timer:
    """Seconds per call of a compiled function, on demand."""

    def __init__(self, function: Callable, args: tuple, calls: int):
        self._run = lambda: jax.block_until_ready(function(*args))
        self._calls = calls
        self.samples: list[float] = []
        self._run()

    def sample(self) -> None:
        began = time.perf_counter()
        self._run()
        self.samples.append((time.perf_counter() - began) / self._calls)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def ceilings(settings: Settings) -> dict[str, Timer]:
    """Timers of a device copy and of a matrix product."""
    x = jnp.arange(settings.copy_bytes // 4, dtype=jnp.uint32)
    key = jax.random.key(1)
    a = jax.random.normal(key, (settings.matrix, settings.matrix), settings.dtype)
    precision = lax.Precision.HIGHEST if settings.dtype == "float32" else None
    return {
        # An exact copy could be left out by the compiler.
        "copy": Timer(jax.jit(lambda x: x ^ jnp.uint32(1)), (x,), 1),
        "matmul": Timer(
            jax.jit(lambda a: jnp.matmul(a, a, precision=precision)), (a,), 1
        ),
    }


def _exact(settings: Settings, operands: Operands) -> jax.Array:
    """Plain attention in float32."""

    def widen(x):
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.jit(
        lambda given: gathered_attention(settings, jax.tree.map(widen, given))
    )(operands)


def relative_error(out, want) -> float:
    """‖out − want‖ / ‖want‖."""
    out, want = (np.asarray(x, np.float32) for x in (out, want))
    return float(np.linalg.norm(out - want) / np.linalg.norm(want))


def run(settings: Settings, log: Callable[[str], Any] = lambda _: None) -> dict:
    """Measures everything; figures per call, times in seconds, rates per second.

    Args:
      settings: what to measure.
      log: gets a line of progress now and then.

    Returns:
      JSON-ready: `ceilings` (bytes per second of a copy, bytes read plus written;
      operations per second of a matrix product), and `results`, one entry per method
      and T: median, least and greatest time, `paired` (median, least and greatest over
      rounds of its time over the same method's time at the first T), share of the
      copy's bandwidth, share of the product's rate, error against plain attention in
      float32; or `unavailable`, the reason.

    Raises:
      ValueError: the named implementation cannot run here.
    """
    inputs = make_operands(settings)
    cells = [(method, T) for T in settings.nodes for method in settings.methods]
    log(f"compiling {len(cells)} programs side by side")
    # A compiler keeps one core busy, or few.
    with ThreadPoolExecutor() as pool:
        wants = {T: pool.submit(_exact, settings, inputs[T]) for T in settings.nodes}
        jobs = {
            (method, T): pool.submit(_compiled, settings, inputs[T], method)
            for method, T in cells
        }
    results: list[dict[str, Any]] = []
    timers: dict[tuple[str, int], Timer] = {}
    for method, T in cells:
        entry: dict[str, Any] = {"method": method, "nodes": T}
        results.append(entry)
        try:
            one, many, args = jobs[method, T].result()
            entry["error"] = relative_error(one(*args), wants[T].result())
            timers[method, T] = Timer(many, args, settings.calls)
        except Exception as error:  # whatever a back end cannot do
            if method == KERNEL and settings.implementation is not None:
                raise
            entry["unavailable"] = _first_line(error)
    tops = ceilings(settings)
    for number in range(settings.rounds):
        log(f"round {number + 1} of {settings.rounds}")
        for timer in (*tops.values(), *timers.values()):
            timer.sample()
    bandwidth = 2 * settings.copy_bytes / min(tops["copy"].samples)
    rate = 2 * settings.matrix**3 / min(tops["matmul"].samples)
    for entry in results:
        timer = timers.get((entry["method"], entry["nodes"]))
        if timer is not None:
            first = timers.get((entry["method"], settings.nodes[0]))
            entry |= _figures(settings, entry["nodes"], timer, first, bandwidth, rate)
    return {
        "settings": dataclasses.asdict(settings),
        "ceilings": {"copy_bytes_per_s": bandwidth, "matmul_flop_per_s": rate},
        "results": results,
    }


def _compiled(settings: Settings, operands: Operands, method: str):
    """One call, and many in one program, compiled; and their arguments."""
    function, args = candidate(settings, operands, method)
    programs = jax.jit(function), repeated(function, settings.calls)
    return *(program.lower(*args).compile() for program in programs), args


def _figures(settings, T, timer, first, bandwidth, rate) -> dict[str, Any]:
    least, operations = settings.least_bytes(T), settings.operations(T)
    figures = {
        "seconds": _spread(timer.samples),
        "samples": timer.samples,
        "bandwidth_share": least / timer.median / bandwidth,
        "matmul_share": operations / timer.median / rate,
        "floor_seconds": max(least / bandwidth, operations / rate),
    }
    if first is not None:
        pairs = zip(timer.samples, first.samples, strict=True)
        figures["paired"] = _spread([a / b for a, b in pairs])
    return figures


def _spread(samples: Sequence[float]) -> dict[str, float]:
    return {
        "median": statistics.median(samples),
        "least": min(samples),
        "greatest": max(samples),
    }


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def rows(report: dict) -> Iterator[list[str]]:
    """The report as a table of text, its head first."""
    first = report["settings"]["nodes"][0]
    yield ["attention", "T", "µs", "spread", f"× T={first}", "copy", "matmul",
           "floor µs", "error"]  # fmt: skip
    for entry in report["results"]:
        name = [entry["method"], str(entry["nodes"])]
        if "unavailable" in entry:
            yield [*name, *"-" * 6, entry["unavailable"][:60]]
            continue
        seconds, paired = entry["seconds"], entry.get("paired")
        yield [
            *name,
            f"{1e6 * seconds['median']:.1f}",
            f"{1e6 * seconds['least']:.1f}–{1e6 * seconds['greatest']:.1f}",
            f"{paired['median']:.2f}" if paired else "-",
            f"{100 * entry['bandwidth_share']:.0f} %",
            f"{100 * entry['matmul_share']:.0f} %",
            f"{1e6 * entry['floor_seconds']:.1f}",
            f"{entry['error']:.0e}" if math.isfinite(entry["error"]) else "NaN",
        ]
