"""Which rule is lossless for which tree. Free of jax: read before jax starts.

How the drafter proposes the nodes of a tree (`proposal`):

* `shared`: the best tokens by log q plus the very noise that the target will use. The
  tree may be pruned and re-ranked after looking at it (acceptance.exact).
* `sampled`: siblings are sampled one after the other from q without replacement, by
  uniforms of a stream of their own; a shape never depends on what a node turns out to
  be before it is sampled.
* `with_replacement`: the same, siblings sampled independently (SpecInfer, 2305.09781).
* `best`: the likeliest tokens of q, nothing random.
* `best_kept`: the same, with q kept for a cascade.
"""

from __future__ import annotations

import dataclasses

from treespec_jax.errors import UserError
from treespec_jax.trees.shapes import BestFirstShape, TreeShape, is_chain

PROPOSALS = ("shared", "sampled", "with_replacement", "best", "best_kept")
# Proposals that keep the drafter's distributions.
KEEP_Q = ("sampled", "with_replacement", "best_kept")
# Proposals that depend on a temperature of the drafter.
TEMPERED = ("shared", "sampled", "with_replacement")
# Policies between drafter and target (acceptance.cascade), all of them lossy.
CASCADES = ("chow", "diff", "opt", "token_v1", "token_v2", "token_v3")


@dataclasses.dataclass(frozen=True)
class Traits:
    """What is known of a rule before it runs.

    Attributes:
      lossless: emitted tokens follow the policy's distribution exactly.
      proposals: trees that it may judge, the usual one first.
      chain_only: it judges one node per level.
      reason: why it may judge no other tree; the end of an error message.
    """

    lossless: bool
    proposals: tuple[str, ...]
    chain_only: bool = False
    reason: str = ""

    @property
    def label(self) -> str:
        """ "lossless" or "lossy", for tables."""
        return "lossless" if self.lossless else "lossy"


_DIFFER = "siblings must carry different tokens"
_SAMPLED = (
    "it would not be lossless, because it weighs each node against its probability of "
    "being sampled, so that nodes must be sampled from q by randomness of their own "
    "and never pruned or re-ranked afterwards"
)
RULES = {
    "exact": Traits(
        lossless=True,
        proposals=("shared", "best", "sampled", "best_kept"),
        reason=_DIFFER,
    ),
    "token": Traits(
        lossless=True, proposals=("sampled", "with_replacement"), reason=_SAMPLED
    ),
    "block": Traits(
        lossless=True, proposals=("sampled",), chain_only=True, reason=_SAMPLED
    ),
    "traversal": Traits(lossless=True, proposals=("sampled",), reason=_SAMPLED),
    "terminal": Traits(
        lossless=True,
        proposals=("best", "best_kept"),
        reason="its tree must be fixed by the drafter alone, without any sample",
    ),
    "typical": Traits(
        lossless=False,
        proposals=("best", "shared", "sampled", "best_kept"),
        reason=_DIFFER,
    ),
}


def label(rule: str, cascade: str = "", cache_dtype: str = "") -> str:
    """ "lossless" or "lossy", for tables; an int8 cache rounds keys and values."""
    lossy = cascade or cache_dtype == "int8"
    return "lossy" if lossy else RULES[rule].label


def choose_proposal(
    rule: str, proposal: str, shape: TreeShape, cascade: str = ""
) -> str:
    """How to propose a tree for a rule, once rule, proposal and shape fit together.

    Args:
      rule: one of RULES.
      proposal: one of PROPOSALS, or "" for what the rule usually judges.
      shape: of the tree.
      cascade: one of CASCADES, or "" for the target's own distribution. It needs a
        tree that keeps the drafter's distributions.

    Raises:
      UserError: an unknown name, a tree that the rule would not be lossless for, or one
        without what a cascade needs.
    """
    if rule not in RULES:
        raise UserError(f"rule {rule!r} is unknown; choose from {', '.join(RULES)}")
    traits = RULES[rule]
    keeping = [name for name in traits.proposals if name in KEEP_Q]
    if cascade:
        _check_cascade(cascade, shape)
        proposal = proposal or keeping[0]
    proposal = proposal or traits.proposals[0]
    if proposal not in PROPOSALS:
        raise UserError(
            f"proposal {proposal!r} is unknown; choose from {', '.join(PROPOSALS)}"
        )
    if proposal not in traits.proposals:
        raise UserError(
            f"rule {rule!r} cannot judge proposal={proposal!r}: {traits.reason}; take "
            f"proposal={' or '.join(map(repr, traits.proposals))}, or rule='exact'"
        )
    if cascade and proposal not in KEEP_Q:
        raise UserError(
            f"cascade {cascade!r} cannot go with proposal={proposal!r}, which does not "
            "keep the drafter's distributions; take proposal="
            f"{' or '.join(map(repr, keeping))}"
        )
    if traits.chain_only and not is_chain(shape):
        raise UserError(
            f"rule {rule!r} judges chains only, and this tree branches or may branch; "
            "take tree='chain:LENGTH', or rule='traversal', its form for trees"
        )
    if proposal in KEEP_Q and isinstance(shape, BestFirstShape):
        raise UserError(
            f"tree 'dynamic:{shape.nodes}@{shape.depth}' cannot go with rule {rule!r} "
            f"and proposal={proposal!r}: it chooses its nodes after they are proposed; "
            f"take tree='allotted:{shape.nodes}@{shape.depth}', which shares out the "
            "same nodes beforehand"
        )
    return proposal


def _check_cascade(cascade: str, shape: TreeShape) -> None:
    if cascade not in CASCADES:
        raise UserError(
            f"cascade {cascade!r} is unknown; choose from {', '.join(CASCADES)}"
        )
    if shape.depth == 0:
        raise UserError(
            f"cascade {cascade!r} mixes drafter and target, and tree 'none' has no "
            "drafter; take another tree, such as chain:5"
        )
