"""Drafters by the name of their method: one file and one line each; free of jax."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """Where a drafter is found, which is loaded on first use.

    Attributes:
      module: of this package.
      name: of the class.
      needs_model: whether it needs a checkpoint of its own.
      takes_model: whether it can use one.
      has_logits: whether it scores the whole vocabulary, so that a temperature of its
        own means something.
      has_table: whether it recycles successors, which a file can keep
        (`SpeculativeConfig.recycle_table`).
      tree: the shape that it grows unless one is named, where there is no choice.
      ladder: shapes to choose from otherwise, see `trees.shapes.Ladder`.
      ladder_with_model: the same if a model drafts, too; "": no other one.
    """

    module: str
    name: str
    needs_model: bool = False
    takes_model: bool = False
    has_logits: bool = False
    has_table: bool = False
    tree: str = "dynamic:7@5"
    ladder: str = "auto:7@5+3@3+15@7+31@7"
    ladder_with_model: str = ""


# Every level is a pass of a model.
_MODEL = "auto:7@4+3@3+15@5+31@7"

METHODS = {
    "none": Method("none", "NoDrafter", tree="none", ladder="none"),
    "draft_model": Method(
        "draft_model",
        "DraftModel",
        needs_model=True,
        takes_model=True,
        has_logits=True,
        tree="chain:5",
        ladder=_MODEL,
    ),
    "eagle": Method(
        "eagle",
        "Eagle",
        needs_model=True,
        takes_model=True,
        has_logits=True,
        tree="dynamic:7@4",
        ladder=_MODEL,
    ),
    "medusa": Method(
        "medusa",
        "Medusa",
        needs_model=True,
        takes_model=True,
        has_logits=True,
        tree="dynamic:7@3",
        ladder="auto:7@3+3@3+15@4+31@4",
    ),
    "recycle": Method("recycle", "Recycle", has_table=True),
    "ngram": Method("ngram", "Ngram"),
    "suffix": Method("suffix", "Suffix"),
    "last_logits": Method("last_logits", "LastLogitsDrafter"),
    "auto": Method(
        "auto",
        "Auto",
        takes_model=True,
        has_table=True,
        ladder_with_model=_MODEL,
    ),
}
