"""What the TPU compiler says of this program's step and kernel; no TPU is needed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from pallas_kernels import aot
from pallas_kernels.tree_attention import AttentionSpec, estimate, tree_attention
from pallas_kernels.tree_attention.operands import Shape
from pallas_kernels.tree_attention.sizes import LANES, choose
from treespec_jax import sharding, speculation
from treespec_jax.checks import check_int
from treespec_jax.config import EngineConfig, ModelConfig, SpeculativeConfig
from treespec_jax.engine.engine import Engine
from treespec_jax.errors import UserError
from treespec_jax.measurement.tables import markdown
from treespec_jax.models import presets, product_choice
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.quantized import stored_axes_of_leaves
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.weight_types import check_weights, is_int8
from treespec_jax.trees import shapes

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile.

    Attributes:
      topology: see `pallas_kernels.aot.DEVICE_KINDS`.
      model: the target's preset.
      draft: the drafter's preset; None: `small_drafter` of the target.
      tree: a tree shape, or "none".
      batch: B, slots.
      context: rows of prefix per slot.
      page_size: cache rows per page.
      dtype: of activations and cache.
      weights: type of the matrices, see `models.weight_types`; None: `dtype`.
      round_rows: whether products with int8 weights round activations to int8 instead
        of converting the weights, see `models.product_choice`.
      devices: that share the weights (tensor parallelism).
      layers: the target's first so many; 0: all of them.
      nodes: T of the kernel's table.
      tau: of the drafter.
    """

    topology: str = "v5e:2x2"
    model: str = "llama-3.2-1b"
    draft: str | None = None
    tree: str = "regular:4x2x1"
    batch: int = 8
    context: int = 2048
    page_size: int = 128
    dtype: str = "bfloat16"
    weights: str | None = None
    round_rows: bool = False
    devices: int = 1
    layers: int = 0
    nodes: tuple[int, ...] = (1, 16, 64, 128, 256)
    tau: float = 0.7

    def __post_init__(self):
        for name in ("batch", "context", "devices"):
            check_int(name, getattr(self, name), 1)
        check_int("layers", self.layers, 0)
        for count in self.nodes:
            check_int("nodes", count, 1)
        if self.dtype not in DTYPES:
            raise UserError(
                f"dtype {self.dtype!r} is unknown; choose from {', '.join(DTYPES)}"
            )
        if self.weights is not None:
            check_weights(self.weights)
        if self.round_rows and not is_int8(self.weights or self.dtype):
            raise UserError("round_rows is for int8 weights; give --weights=int8")
        shapes.parse(self.tree)
        for name in filter(None, (self.model, self.draft)):
            presets.get(name)
        try:
            aot.device_kind(self.topology)
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def kind(self) -> aot.DeviceKind:
        return aot.device_kind(self.topology)

    @property
    def types(self) -> str:
        """Of activations and cache, and of weights where it is another, in words."""
        weights = f" with {self.weights} weights" if self.weights else ""
        rounded = ", rows rounded to int8" if self.round_rows else ""
        return self.dtype + weights + rounded

    @property
    def target(self) -> ModelConfig:
        whole = presets.get(self.model)
        if not self.layers:
            return whole
        kept = min(self.layers, whole.num_layers)
        local = tuple(layer for layer in whole.local_layers if layer < kept)
        return dataclasses.replace(whole, num_layers=kept, local_layers=local)

    @property
    def drafter(self) -> ModelConfig:
        return presets.get(self.draft) if self.draft else small_drafter(self.target)


@dataclasses.dataclass(frozen=True)
class KernelResult:
    """The kernel alone: its program, its cost per prefix, and its HBM traffic."""

    report: aot.Report
    kernel: aot.KernelReport
    prefix: estimate.PrefixCost
    traffic: estimate.CallBytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        parts = dataclasses.asdict(self.prefix), dataclasses.asdict(self.traffic)
        return {**self.report.to_dict(), "prefix": parts[0], "traffic": parts[1]}


def small_drafter(target: ModelConfig) -> ModelConfig:
    """Four narrow layers over the target's vocabulary; eight devices can share them."""
    return dataclasses.replace(
        target,
        embed_dim=512,
        mlp_dim=1536,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        window=None,
        local_layers=(),
        local_rotary=None,
    )


def abstract_model(
    config: ModelConfig,
    dtype: str,
    devices: Sequence[jax.Device] = (),
    weights: str | None = None,
) -> Transformer:
    """A model with shapes in place of parameters, cut by the default rules.

    Args:
      config: of the model.
      dtype: of activations, norms and biases.
      devices: that share it; empty: not known, as for lowering alone.
      weights: type of the matrices; None: `dtype`.
    """
    model = Transformer(config, dtype=jnp.dtype(dtype), weights=weights, rngs=None)
    if not devices:
        return model
    mesh = sharding.make_mesh({sharding.TENSOR: len(devices)}, devices)

    def abstract(leaf, axes):
        if len(devices) == 1:
            where = SingleDeviceSharding(devices[0])
        else:
            where = sharding.sharding_of(axes, leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    flat = FlatModule(model)
    variables = jax.tree.leaves(
        nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    # A matrix in int8 is two leaves.
    axes = [
        found
        for variable in variables
        for found in stored_axes_of_leaves(
            variable.get_value(), variable.get_metadata("logical_axes")
        )
    ]
    return flat.bind(tuple(map(abstract, flat.leaves, axes)))


def abstract_engine(job: Job, devices: Sequence[jax.Device] = ()) -> Engine:
    """An engine of abstract models; its `program` can be lowered and compiled.

    Args:
      job: what to compile.
      devices: see `abstract_model`.

    Raises:
      UserError: a preset, tree or size that does not fit.
    """
    target, drafter = (
        abstract_model(config, job.dtype, devices, job.weights)
        for config in (job.target, job.drafter)
    )
    if job.round_rows:
        for model in (target, drafter):
            product_choice.round_rows(model)
    config = EngineConfig(job.batch, job.context, job.page_size, cache_dtype=job.dtype)
    speculative = SpeculativeConfig(tree=job.tree)
    return Engine(target, config, speculation.make(speculative, drafter, job.tau))


def compile_step(job: Job) -> aot.Compilation:
    """Compiles a dispatch: draft, verify, accept and commit in a loop.

    Raises:
      UserError: what cannot be compiled, or no compiler.
    """
    try:
        devices = aot.topology_devices(job.topology)
    except (ValueError, aot.CompilerUnavailable) as error:
        raise UserError(str(error)) from None
    if job.devices > len(devices):
        raise UserError(
            f"devices={job.devices} is more than the {len(devices)} of {job.topology}; "
            "lower it or name a larger topology"
        )
    function, arguments = abstract_engine(job, devices[: job.devices]).program()
    return _compile(
        job, function, *arguments, donate_argnums=1, least_bytes=_step_bytes(job)
    )


def compile_kernel(job: Job, nodes: int) -> KernelResult:
    """Compiles tree attention alone at the target's shape, with `nodes` new rows.

    Raises:
      UserError: what cannot be compiled, or no compiler.
    """
    c = job.target
    K, G, H = c.num_kv_heads, c.queries_per_kv, c.head_dim
    operands = Shape(
        slots=job.batch,
        prefix=job.context,
        kv_heads=K,
        group=G,
        head_dim=H,
        page=job.page_size,
        dtype=job.dtype,
    ).operands(nodes, LANES)
    sizes = choose(job.kind.kind, nodes * G, K)
    spec = AttentionSpec(scale=H**-0.5, implementation="tpu", block_sizes=sizes)
    attend = functools.partial(tree_attention, spec=spec)
    report = _compile(job, attend, operands, kernels=True).report
    kernel = report.kernel("tree_attention")
    cost = estimate.prefix_cost(kernel, job.kind, operands, spec)
    moved = estimate.call_bytes(cost, operands, spec, job.context)
    return KernelResult(report, kernel, cost, moved)


def study(job: Job, kernel: bool, step: bool) -> tuple[Callable, Callable]:
    """Functions that compile the kernel, the step or both, and show it as Markdown.

    The first raises UserError: what cannot be compiled, or no compiler.
    """
    kernels: dict[int, KernelResult] = {}
    steps: list[aot.Report] = []

    def measure() -> dict[str, Any]:
        try:
            aot.prepare(dump=kernel)
        except aot.CompilerUnavailable as error:
            raise UserError(str(error)) from None
        names = ("jax", "libtpu")
        results = {
            "source": "compiler's estimates",
            "job": dataclasses.asdict(job),
            "versions": {name: importlib.metadata.version(name) for name in names},
        }
        if kernel:
            kernels.update((nodes, compile_kernel(job, nodes)) for nodes in job.nodes)
            results["kernel"] = {n: row.to_dict() for n, row in kernels.items()}
        if step:
            steps.append(compile_step(job).report)
            results["step"] = steps[0].to_dict()
        return results

    def table(results: dict[str, Any]) -> str:
        named = ", ".join(f"{n} {v}" for n, v in results["versions"].items())
        parts = [f"Compiler's estimates, not measurements: {job.kind.kind}, {named}."]
        if kernels:
            parts.append(kernel_table(job, kernels))
        parts += [step_table(job, report) for report in steps]
        parts += [collectives_table(r) for r in steps if r.num_devices > 1]
        return "\n\n".join(parts)

    return measure, table


def kernel_table(job: Job, results: dict[int, KernelResult]) -> str:
    """A row per number of nodes."""
    c = job.target
    head = "nodes", "rows", "bundles", "cycles", "bundles / D", "cycles / D", "MXU"
    rows = [(*head, "spills", "bytes / least", "temporaries")]
    for nodes, result in results.items():
        cost, traffic = result.prefix, result.traffic
        rows.append(
            (
                f"{nodes}",
                f"{nodes * c.queries_per_kv}",
                f"{cost.bundles:.0f}",
                f"{cost.cycles:.0f}",
                f"{cost.bundles / cost.stream_cycles:.2f}",
                f"{cost.cycles / cost.stream_cycles:.2f}",
                f"{100 * cost.mxu_share:.0f} %",
                f"{result.kernel.mix.spills}",
                f"{traffic.moved / traffic.least:.3f}",
                _mb(result.report.temporary_bytes),
            )
        )
    return (
        f"Kernel at the shape of {job.model} (K={c.num_kv_heads}, "
        f"G={c.queries_per_kv}, H={c.head_dim}, {job.dtype}), {job.batch} slots × "
        f"{job.context} rows of prefix, pages of {job.page_size}. Bundles and cycles "
        "are those of 128 rows of prefix and one key/value head, which memory delivers "
        f"in D = {cost.stream_cycles:.0f} cycles:\n\n" + markdown(rows)
    )


def step_table(job: Job, report: aot.Report) -> str:
    """Two columns: what, and how much."""
    kind, roof = job.kind, report.roofline
    cycles = report.estimated_cycles / kind.clock
    given = report.optimal_seconds
    kernels = ", ".join(f"{n} × {k}" for k, n in report.instances.items())
    rows = [
        ("figure", "estimate"),
        ("arguments", _mb(report.argument_bytes)),
        ("of them updated in place", _mb(report.aliased_bytes)),
        ("temporaries", _mb(report.temporary_bytes)),
        ("program", _mb(report.code_bytes)),
        ("least bytes of HBM", _mb(report.least_bytes)),
        ("HBM traffic, by the program's text", _mb(report.traffic.total)),
        ("of it fetched ahead of use", _mb(report.traffic.fetched)),
        ("of it by the kernels, pages full", _mb(report.traffic.kernels)),
        ("of it by all else", _mb(report.traffic.computed)),
        ("operations", f"{report.flops / 1e9:.1f} G"),
        ("roofline, memory", f"{1e3 * roof.memory:.2f} ms"),
        ("roofline, compute", f"{1e3 * roof.compute:.2f} ms"),
        ("time, by the compiler", f"{1e3 * given:.2f} ms" if given else "not given"),
        ("cycles of all fusions, as time", f"{1e3 * cycles:.2f} ms"),
        ("kernels", kernels or "-"),
        ("compilation, on this machine", f"{report.compile_seconds:.0f} s"),
    ]
    return (
        f"Step of {job.model} with tree {job.tree}, {job.types}, {job.batch} slots × "
        f"{job.context} rows, {report.num_devices} device(s), figures of one; loops "
        "and both sides of conditionals count once. Traffic is what instructions move "
        "between HBM and the core at most: of conditionals the side that moves more, "
        "of what is updated in place only the rows. XLA's "
        f'"bytes accessed" ({_mb(report.bytes_accessed)}) is no such figure: it '
        "charges every slice of a weight that is fetched ahead with the whole weight, "
        "and what lies in vector memory again at each use:\n\n" + markdown(rows)
    )


def collectives_table(report: aot.Report) -> str:
    """A row per kind and size of what the devices exchange, the largest first."""
    head = "collective", "count", "bytes of each", "hidden", "fetched meanwhile"
    rows = [head]
    for row in report.collectives[:8]:
        hidden = f"{row.beside} of {row.count}"
        sizes = f"{row.size}", hidden, _mb(row.fetching)
        rows.append((row.kind, f"{row.count}", *sizes))
    rest = sum(row.count for row in report.collectives[8:])
    return (
        "What the devices exchange. Hidden are those during which copies from HBM are "
        "under way, of so many bytes on average, or that are asynchronous; "
        f"{rest} more are of few bytes:\n\n" + markdown(rows)
    )


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def _compile(job: Job, function, *arguments, **options) -> aot.Compilation:
    options = {"kernels": False, **options}
    try:
        return aot.compile_for(job.topology, function, *arguments, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the TPU compiler refuses this program: {reason}") from error


def _step_bytes(job: Job) -> int:
    """Weights and prefix of every forward pass once, per device."""
    itemsize = jnp.dtype(job.dtype).itemsize

    def one_pass(config):
        model = abstract_model(config, job.dtype, weights=job.weights)
        weights = sum(x.size * x.dtype.itemsize for x in FlatModule(model).leaves)
        if not config.tied_embeddings:  # only a few rows of the table are read
            table = jax.tree.leaves(model.embedding.get_value())
            weights -= sum(x.size * x.dtype.itemsize for x in table)
        rows = config.num_layers * 2 * config.num_kv_heads * config.head_dim
        return weights + job.batch * job.context * rows * itemsize

    total = one_pass(job.target)
    if job.tree != "none":
        total += shapes.parse(job.tree).depth * one_pass(job.drafter)
    return total // job.devices
