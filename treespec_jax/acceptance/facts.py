"""Which rule is lossless for which tree. Light: read before jax starts.

How a drafter draws the nodes of its tree (`draws`):

* `shared`: best tokens by log q plus the very noise that the target will use. The tree
  may be pruned and re-ranked after looking at it (acceptance.exact).
* `sampled`: siblings drawn one after the other from q without replacement, by uniforms
  of a stream of their own; a shape never depends on what a node turns out to be before
  it is drawn (drafting.sampled).
* `with_replacement`: the same, siblings drawn independently (SpecInfer, 2305.09781).
* `best`: the likeliest tokens of q, nothing random.
* `best_kept`: the same level by level as for `sampled`, with q kept for a cascade.
"""

from __future__ import annotations

import dataclasses

from treespec_jax.errors import UserError
from treespec_jax.trees.shapes import StaticShape, TreeShape

# Temperatures below this are greedy: logits / temperature would overflow.
MIN_TEMPERATURE = 1e-5
DRAWS = ("shared", "sampled", "with_replacement", "best", "best_kept")
# Draws that keep the drafter's distributions.
KEPT = ("sampled", "with_replacement", "best_kept")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a rule before it runs.

    Attributes:
      lossless: emitted tokens follow the policy's law exactly.
      draws: trees that it may judge, the usual one first.
      chain_only: it judges one node per level.
      because: why it may judge no other tree; the end of an error message.
    """

    lossless: bool
    draws: tuple[str, ...]
    chain_only: bool = False
    because: str = ""

    @property
    def label(self) -> str:
        """ "lossless" or "lossy", for tables."""
        return "lossless" if self.lossless else "lossy"


_DIFFER = "siblings must carry different tokens"
_SAMPLED = (
    "it would not be lossless, because it weighs each node against its chance of being "
    "drawn, so that nodes must be drawn from q by randomness of their own and never "
    "pruned or re-ranked afterwards"
)
FACTS = {
    "exact": Facts(
        lossless=True,
        draws=("shared", "best", "sampled", "best_kept"),
        because=_DIFFER,
    ),
    "token": Facts(
        lossless=True, draws=("sampled", "with_replacement"), because=_SAMPLED
    ),
    "block": Facts(
        lossless=True, draws=("sampled",), chain_only=True, because=_SAMPLED
    ),
    "traversal": Facts(lossless=True, draws=("sampled",), because=_SAMPLED),
    "terminal": Facts(
        lossless=True,
        draws=("best", "best_kept"),
        because="its tree must be fixed by the drafter alone, without any sample",
    ),
    "typical": Facts(
        lossless=False,
        draws=("best", "shared", "sampled", "best_kept"),
        because=_DIFFER,
    ),
}
RULES = tuple(FACTS)
# Policies between drafter and target (acceptance.cascade), all of them lossy.
CASCADES = ("chow", "diff", "opt", "token_v1", "token_v2", "token_v3")


def label(rule: str, cascade: str = "", cache_dtype: str = "") -> str:
    """ "lossless" or "lossy", for tables; a cache with a dtype of its own rounds."""
    return "lossy" if cascade or cache_dtype else FACTS[rule].label


def choose_draws(rule: str, draws: str, shape: TreeShape, cascade: str = "") -> str:
    """How to draw a tree for a rule, once the three fit together.

    Args:
      rule: one of RULES.
      draws: one of DRAWS, or "" for what the rule usually judges.
      shape: of the tree.
      cascade: one of CASCADES, or "" for the target's own law. It needs a tree that
        keeps the drafter's distributions.

    Raises:
      UserError: an unknown name, a tree that the rule would not be lossless for, or one
        without what a cascade needs.
    """
    if rule not in FACTS:
        raise UserError(f"rule {rule!r} is unknown; choose from {', '.join(RULES)}")
    facts = FACTS[rule]
    kept = [own for own in facts.draws if own in KEPT]
    if cascade:
        _check_cascade(cascade, shape)
        draws = draws or kept[0]
    draws = draws or facts.draws[0]
    if draws not in DRAWS:
        raise UserError(f"draws {draws!r} is unknown; choose from {', '.join(DRAWS)}")
    if draws not in facts.draws:
        raise UserError(
            f"rule {rule!r} cannot judge draws={draws!r}: {facts.because}; take "
            f"draws={' or '.join(map(repr, facts.draws))}, or rule='exact'"
        )
    if cascade and draws not in KEPT:
        raise UserError(
            f"cascade {cascade!r} cannot go with draws={draws!r}, which does not keep "
            f"the drafter's distributions; take draws={' or '.join(map(repr, kept))}"
        )
    if facts.chain_only and not _is_chain(shape):
        raise UserError(
            f"rule {rule!r} judges chains only, and this tree branches or may branch; "
            "take tree='chain:LENGTH', or rule='traversal', its form for trees"
        )
    return draws


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


def _is_chain(shape: TreeShape) -> bool:
    return isinstance(shape, StaticShape) and shape.depth == shape.num_nodes - 1
