"""Where an engine's weights lie, and with them all that it computes."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from treespec_jax.errors import UserError
from treespec_jax.models.arithmetic import bitwise
from treespec_jax.models.quantized import stored_axes
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import Pages
from treespec_jax.sharding import Placement


def placement(target: nnx.Module, draft: nnx.Module | None) -> Placement:
    """The devices of a pair; the cache's heads are cut as those of the target are.

    Args:
      target: its parameters may be abstract.
      draft: None: no drafter.

    Raises:
      UserError: the two lie on different devices.
    """
    mesh, axis, device = _of(target)
    if draft is not None:
        draft_mesh, _, draft_device = _of(draft)
        lie = (mesh, device), (draft_mesh, draft_device)
        if None not in (device, draft_device) and lie[0] != lie[1]:
            raise UserError(
                f"the target lies on {_text(*lie[0])}, the drafter on "
                f"{_text(*lie[1])}; load both with the same mesh"
            )
    return Placement(mesh, axis, device.device_kind if device is not None else None)


def in_arithmetic(target: Transformer, exact: str) -> Transformer:
    """A model as an engine of some `EngineConfig.exact` computes with it.

    Raises:
      UserError: "bitwise", and the model is not of the types that it takes, or lies on
        several devices or on one that is no CPU.
    """
    if not exact:
        return target
    types, (mesh, _, device) = target.types, _of(target)
    if not types.is_int8 or types.dtype != np.float32:
        raise UserError(
            f'exact="bitwise" wants int8 weights and float32 activations, not '
            f"{types.weights} and {types.dtype}; load the model with weights='int8'"
        )
    if mesh is not None or (device is not None and device.platform != "cpu"):
        raise UserError(
            f'exact="bitwise" runs on one CPU, and the model lies on '
            f"{_text(mesh, device)}; set JAX_PLATFORMS=cpu"
        )
    return bitwise(target)


def device(target: nnx.Module) -> jax.Device | None:
    """One that holds parameters, one to compile for included; None: not known."""
    return _of(target)[2]


def platform(target: nnx.Module) -> str:
    """Kind of the devices that hold the parameters, such as "cpu" or "tpu".

    That may be one to compile for; of abstract parameters it is jax's default.
    """
    device = _of(target)[2]
    return jax.default_backend() if device is None else device.platform


def pin(tree, mesh: Mesh | None):
    """Fixes where a program leaves its results; to be called in a jitted function.

    What goes in and out of every step stays where it is, so that it is updated in place
    and the next call finds the same program.

    Args:
      tree: pages lie as their `placement` says, all else on every device.
      mesh: None: nothing to do.
    """

    def constrain(x):
        return jax.lax.with_sharding_constraint(x, _sharding(mesh, x))

    return tree if mesh is None else _map(constrain, tree)


def described(tree, mesh: Mesh | None):
    """Shapes in place of the arrays of a tree, where `pin` would have them."""

    def describe(x):
        sharding = None if mesh is None else _sharding(mesh, x)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                np.shape(leaf), leaf.dtype, sharding=sharding
            ),
            x,
        )

    return _map(describe, tree)


def _map(f, tree):
    return jax.tree.map(f, tree, is_leaf=lambda x: isinstance(x, Pages))


def _sharding(mesh: Mesh, x) -> NamedSharding:
    spec = x.placement.heads_spec if isinstance(x, Pages) else PartitionSpec()
    return NamedSharding(mesh, spec)


def _of(module: nnx.Module):
    """Mesh, the axis of it that cuts key/value heads, and one device; or None each."""
    mesh = axis = device = None
    for variable in jax.tree.leaves(
        nnx.state(module), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        # Of an int8 weight the values stand first; their scales lie beside them.
        leaf, *_ = jax.tree.leaves(variable)
        sharding = getattr(leaf, "sharding", None)
        if sharding is None or isinstance(leaf, jax.core.Tracer):
            continue
        device = min(sharding.device_set, key=lambda device: device.id)
        if isinstance(sharding, NamedSharding):
            mesh = sharding.mesh
            axes = variable.get_metadata().get("logical_axes", ())
            axes = stored_axes(variable.get_value(), axes)
            if "kv_heads" in axes:
                spec = (*sharding.spec, *([None] * len(axes)))
                axis = axis or spec[axes.index("kv_heads")]
    return mesh, axis, device


def _text(mesh, device) -> str:
    if mesh is None:
        return str(device)
    return "mesh " + ",".join(f"{name}:{size}" for name, size in mesh.shape.items())
