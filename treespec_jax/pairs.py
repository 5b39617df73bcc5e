"""Target and drafter as users name them: described, then loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from treespec_jax import distributed
from treespec_jax.checkpoints import Description, LoadedModel, describe, drafters, load
from treespec_jax.checkpoints.drafters import (
    DrafterDescription,
    LoadedDrafter,
    load_drafter,
)
from treespec_jax.checkpoints.files import cache_folder
from treespec_jax.checkpoints.recycle_table import Table
from treespec_jax.checks import from_mapping
from treespec_jax.config import SamplingParams, SpeculativeConfig
from treespec_jax.drafting import recycle, wiring
from treespec_jax.drafting.protocol import Drafter
from treespec_jax.engine import placement
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.errors import UserError
from treespec_jax.models import product_choice
from treespec_jax.models.weight_types import check_weights, is_int8

Model = Description | LoadedModel
Draft = Model | DrafterDescription | LoadedDrafter
# Texts, and tokens of each, on which a drafter is tried.
_TEXTS, _CHECKED = 4, 64


def speculative_config(given: Any) -> SpeculativeConfig:
    """How to speculate: the object, a mapping of its fields, or None for not at all.

    Raises:
      UserError: anything else; names it.
    """
    if isinstance(given, SpeculativeConfig):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise UserError(
            f"speculative must be SpeculativeConfig or its fields, got {given!r:.60}"
        )
    values = {"method": "none"} if given is None else given
    return from_mapping(SpeculativeConfig, values, "speculative")


def described(model: str | Path | Model, tokenizer: str | Path | None = None) -> Model:
    """A checkpoint that a path or a name stands for; what is read already stays.

    Args:
      model: path or name of a checkpoint, a description of one, or a loaded one.
      tokenizer: path or name of another tokenizer than the checkpoint's own.

    Raises:
      UserError: it cannot be read, or is none of these.
    """
    if not isinstance(tokenizer, str | Path | None):
        raise UserError(f"tokenizer must be a path or a name, got {tokenizer!r:.60}")
    if isinstance(model, (Description, LoadedModel)):
        if tokenizer is not None:
            raise UserError(
                "a model that is described or loaded has its tokenizer; give its path, "
                "or pass the tokenizer to checkpoints.load instead"
            )
        return model
    if not isinstance(model, (str, Path)):
        raise UserError(f"model must be a path or a loaded model, got {model!r}")
    return describe(model, tokenizer)


def described_draft(
    target: Model, config: SpeculativeConfig, tokenizer: str | Path | None
) -> Draft:
    """The drafter that a configuration names, for a target.

    Raises:
      UserError: it cannot be read, or does not fit.
    """
    draft = drafters.describe_draft(target, config, tokenizer)
    if isinstance(draft, (DrafterDescription, LoadedDrafter)):
        return draft
    return described(draft)


def loaded_draft(
    draft: Draft, target: LoadedModel, mesh: jax.sharding.Mesh | None
) -> LoadedModel | LoadedDrafter:
    """A drafter with its weights, where the target's are and in their form.

    What is quick was measured for the target. A drafter is mostly too small to have it
    measured for itself.
    """
    if isinstance(draft, DrafterDescription):
        draft = load_drafter(draft, target)
    elif not isinstance(draft, LoadedDrafter):
        draft = loaded(draft, target.dtype, mesh, target.weights)
    leaves = jax.tree.leaves(nnx.state(target.model))
    if any(leaf.dtype == np.uint8 for leaf in leaves):
        product_choice.add_offset(draft.model)
    return draft


def loaded(
    model: Model, dtype: Any, mesh: jax.sharding.Mesh | None, weights: str | None
) -> LoadedModel:
    """A model with its weights; arguments as of `checkpoints.load`.

    Raises:
      UserError: a loaded model and a mesh to put it on; an unknown type of weights.
    """
    if weights is not None:
        check_weights(weights)
    if isinstance(model, Description):
        model = load(model, dtype, mesh=mesh, weights=weights)
    elif mesh is not None:
        raise UserError(
            "a loaded model stays where it is; give its path, or pass the mesh to "
            "checkpoints.load instead"
        )
    product_choice.prepare(model.model, model.dtype, cache_folder())
    return model


def weight_notes(target: LoadedModel) -> tuple[str, ...]:
    """What to know of the type of a target's weights."""
    if not is_int8(target.weights):
        return ()
    note = (
        f"weights are {target.weights}, rounded (LOSSY against float32 weights); "
        "speculation changes nothing of what they give"
    )
    if product_choice.rounds_rows(target.model):
        note += "; products on this device round activations to int8 too"
    return (note,)


def try_drafter(engine: Engine, target: LoadedModel, draft: LoadedDrafter) -> None:
    """Tries a drafter on text that the target writes; see `drafting.wiring`.

    Args:
      engine: over both, which nobody else uses yet.
      target: of the engine.
      draft: of the engine.

    Raises:
      UserError: it is wired wrongly.
    """
    settings = engine.config
    count = min(_CHECKED, settings.max_len - 1)
    if draft.known or count < 3:
        return
    mesh = placement.placement(target.model, None).mesh
    wired = distributed.repeated(_Wiring(target, draft), ("check",), mesh)
    if distributed.is_follower():
        return
    config = target.config
    begins = [config.bos_id, *config.eos_ids, 0]
    begin = next(token for token in begins if token is not None)
    usual = SamplingParams(max_tokens=count, temperature=1.0, ignore_eos=True)
    requests = [
        Request([begin], dataclasses.replace(usual, seed=seed))
        for seed in range(min(_TEXTS, settings.max_batch))
    ]
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.advance()
    # A pool of few pages may have ended some early.
    shortest = min(len(request.tokens) for request in requests)
    if shortest >= 3:
        texts = np.asarray([r.tokens[:shortest] for r in requests], np.int32)
        wired.check(texts)
    engine.reset()


@dataclasses.dataclass(frozen=True)
class _Wiring:
    """A drafter and its target, in every process that has a part of them."""

    target: LoadedModel
    draft: LoadedDrafter

    def check(self, texts: np.ndarray) -> None:
        """Raises UserError for a drafter that `wiring.check` refuses."""
        parts = self.target.model, self.draft.model
        wiring.check(*parts, texts, self.draft.source)


def recycle_table_of(drafter: Drafter, engine: Engine) -> Table | None:
    """What all requests taught, in copies: the next dispatch takes the arrays."""
    found = recycle.table_of(drafter, engine.draft_state)
    return found and Table(np.array(found.best)[0], np.array(found.logits)[0])


def with_recycle_table(drafter: Drafter, table: Table, state: Any) -> Any:
    """A drafter's state with a table, of as many successors as the drafter has."""
    count = recycle.table_of(drafter, state).best.shape[2]
    table = table.resized(count)
    return recycle.with_table(state, table.best, table.logits)
