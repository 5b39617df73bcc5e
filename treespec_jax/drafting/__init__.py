"""Drafters by the name of their method: one file and one line each; free of jax."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """Where a drafter is found, which is loaded on first use.

    Attributes:
      module: of this package.
      name: of the class.
      has_model: whether it needs a checkpoint of its own.
      has_table: whether it recycles successors, which a file can keep
        (`SpeculativeConfig.recycle_table`).
    """

    module: str
    name: str
    has_model: bool = False
    has_table: bool = False


METHODS = {
    "none": Method("none", "NoDrafter"),
    "draft_model": Method("draft_model", "DraftModel", has_model=True),
    "recycle": Method("recycle", "Recycle", has_table=True),
    "ngram": Method("ngram", "Ngram"),
    "suffix": Method("suffix", "Suffix"),
    "last_logits": Method("last_logits", "LastLogitsDrafter"),
    "auto": Method("auto", "Auto", has_table=True),
}
