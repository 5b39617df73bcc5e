"""The sparse trees that Medusa publishes (2401.10774), tuned on its heads.

Facts from medusa/model/medusa_choices.py of github.com/FasterDecoding/Medusa at commit
e1154c0. A tree is written as the number of children of each node in level order, a
digit of base 36 each; levels are separated by dots, zeros at a level's end left out.
"""

from __future__ import annotations

from treespec_jax.trees.topology import Topology

_TREES = {
    "mc_sim_7b_63": "a.a732111111.a32111110020000001.2",
    "vicuna_7b_stage1": "a.a743221111.932111000020000001.1",
    "vicuna_7b_stage1_ablation": "a.a422111.a4211100003100101.41100000001",
    "vicuna_7b_stage2": "a.a5221111.9421110000310001.4110000001",
    "vicuna_13b_stage1": "a.a74221111.a42111000021000001.1",
    "vicuna_13b_stage2": "a.a42111.a4211100003100101.42100000001000000001",
    "vicuna_33b_stage1": "a.a853221111.9321100000200000001",
    "vicuna_33b_stage2": "a.a5321111.a421110000310001.31000000001",
    "zephyr_stage2": "a.a6422111.a4211100002100001.21",
}
NAMES = tuple(_TREES)


def topology(name: str) -> Topology:
    """The tree of one of NAMES; each has 63 nodes below its root."""
    parents, level = [-1], [0]
    for counts in _TREES[name].split("."):
        below = []
        for parent, count in zip(level, counts, strict=False):
            children = int(count, 36)
            below += range(len(parents), len(parents) + children)
            parents += [parent] * children
        level = below
    return Topology(tuple(parents))
