"""Rules from logical axes to mesh axes. Fake meshes: nothing is placed."""

import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from tests.conftest import TINY
from treespec_jax.checkpoints.placement import abstract_parameters
from treespec_jax.errors import UserError
from treespec_jax.models.weight_types import types_of
from treespec_jax.sharding import Rules, make_mesh, partition, sharding_of


def grid(**axes):
    """A mesh without devices."""
    return AbstractMesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
    )


def test_default_rules_cut_every_large_parameter():
    """Tensor parallelism over two devices: only norms stay whole."""
    _, _, flat = abstract_parameters(TINY, types_of("float32"))
    cut = {
        path: tuple(partition(axes, leaf.shape, grid(tensor=2))[0])
        for path, leaf in flat.items()
        for axes in [leaf.get_metadata("logical_axes")]
    }
    assert {path: spec for path, spec in cut.items() if any(spec)} == {
        f"layers.{i}.{name}": spec
        for i in range(TINY.num_layers)
        for name, spec in {
            "attention.qkv": ("tensor", None, None, None),
            "attention.out": (None, "tensor", None),
            "mlp.gate_up": (None, "tensor", None),
            "mlp.down": (None, "tensor"),
        }.items()
    }
    # 97 rows do not divide by two.
    table = flat["embedding"].get_metadata("logical_axes")
    assert partition(table, (98, 32), grid(tensor=2))[0] == PartitionSpec(
        "tensor", None
    )


def test_an_axis_that_does_not_divide_is_whole_and_says_so():
    spec, reasons = partition(("vocab", "embed"), (97, 32), grid(tensor=4))
    assert spec == PartitionSpec(None, None)
    assert reasons == ("vocab: tensor:4 does not divide 97",)
    spec, reasons = partition(("vocab", "embed"), (96, 32), grid(tensor=4))
    assert (spec, reasons) == (PartitionSpec("tensor", None), ())


def test_one_mesh_axis_cuts_one_axis_of_a_parameter():
    rules = Rules((("mlp", "tensor"), ("embed", "tensor")))
    spec, reasons = partition(("embed", "mlp"), (32, 48), grid(tensor=4), rules)
    assert spec == PartitionSpec("tensor", None)
    assert reasons == ("mlp: tensor already cuts embed",)


def test_two_mesh_axes():
    rules = Rules({"embed": "data", "mlp": "tensor"})
    spec, reasons = partition(("embed", "mlp"), (32, 48), grid(data=2, tensor=3), rules)
    assert (spec, reasons) == (PartitionSpec("data", "tensor"), ())


def test_a_rule_without_its_mesh_axis_is_an_error():
    with pytest.raises(
        UserError,
        match="rule for 'mlp' names mesh axis 'tensor', which mesh data:2 does not",
    ):
        partition(("embed", "mlp"), (32, 48), grid(data=2))
    # An axis that nothing asks for is no mistake.
    assert partition(("embed",), (32,), grid(data=2))[0] == PartitionSpec(None)


def test_axes_that_do_not_fit_the_array():
    with pytest.raises(UserError, match=r"\('embed',\) do not describe .* \[3, 4\]"):
        partition(("embed",), (3, 4), grid(tensor=1))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([("mlp", "a"), ("mlp", "b")], "name axis 'mlp' twice"),
        ({"mlp": 3}, "'mlp': 3 must go from the name"),
    ],
)
def test_rules_that_are_none(axes, message):
    with pytest.raises(UserError, match=message):
        Rules(axes)


def test_rules_are_hashable_and_equal_by_value():
    assert len({Rules(), Rules(dict(Rules().axes)), Rules({})}) == 2


def test_meshes_by_name():
    mesh = make_mesh("tensor:1")
    assert dict(mesh.shape) == {"tensor": 1}
    assert make_mesh({"data": 1, "tensor": 1}).axis_names == ("data", "tensor")
    assert make_mesh(" data:1, tensor:1").axis_names == ("data", "tensor")
    sharding = sharding_of(("mlp",), (5,), mesh)
    assert sharding.spec == PartitionSpec("tensor")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("", "must read like"),
        ("tensor", "must read like"),
        ("tensor:x", "must read like"),
        ("tensor:-1", "must read like"),
        ("tensor:1,tensor:1", "names axis 'tensor' twice"),
        ("tensor:0", "'tensor' must have a whole number >= 1 of devices, got 0"),
        ({"tensor": True}, "must have a whole number"),
        ({}, "a mesh needs an axis"),
        ("tensor:4096", "mesh tensor:4096 asks for 4096 devices, there are"),
    ],
)
def test_meshes_that_are_none(axes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(axes)
