"""What lowering for cuda leaves: the Triton module of each kernel, verified."""

from __future__ import annotations

import jax
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from pallas_kernels.compat import gpu_target

TARGET = "__gpu$xla.gpu.triton"


def lower_for_cuda(function, *args, **kwargs):
    """The program of a jitted function for a GPU, made on any machine."""
    with gpu_target():
        traced = jax.jit(function).trace(*args, **kwargs)
        return traced.lower(lowering_platforms=("cuda",))


def triton_modules(lowered) -> list[str]:
    """The text of every kernel's module.

    Raises:
      MLIRError: Triton's dialect finds a module ill-formed, which lowering doesn't
        notice: it only writes the module down, and the device's compiler reads it.
    """
    found = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and TARGET in str(
            op.attributes["call_target_name"]
        ):
            config = op.attributes["mhlo.backend_config"]
            found.append(ir.StringAttr(config["ir"]).value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    context = mlir.make_ir_context()
    dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context:
        return [str(ir.Module.parse(module)) for module in found]
