"""A pass of beam search on the device: look at trees, then go on in them.

Between the two the host decides (`engine.beams`). A beam may go on in another slot's
tree: rows are gathered by the slot that they come from, and what slots keep is copied
from it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from treespec_jax.cache import pages as paging
from treespec_jax.cache.pages import Copies
from treespec_jax.drafting.protocol import Committed, Successors
from treespec_jax.engine import sharing
from treespec_jax.engine import step as stepping
from treespec_jax.engine.state import Control, DecodeState
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import CacheView
from treespec_jax.sampling import select
from treespec_jax.speculation import Speculation
from treespec_jax.trees.shapes import TreeShape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Looked:
    """What stays on the device between the halves of a pass.

    Attributes:
      kv: per layer [B, K, 2, T, H], of the nodes.
      features: per layer that the drafter reads [D, R].
      tokens: int32 [B, T].
      real: bool [B, T], nodes of beams.
      best: int32 [B, T, n], successors that the drafter wants; None if it wants none.
      logits: float32 [B, T, n], likewise.
    """

    kv: Any
    features: tuple[jax.Array, ...]
    tokens: jax.Array
    real: jax.Array
    best: jax.Array | None
    logits: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """What the host gets to see, the fields of `beams.Seen` on the device."""

    tokens: jax.Array
    parents: jax.Array
    valid: jax.Array
    best: jax.Array
    log_probs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moves:
    """Where every slot goes on.

    Attributes:
      origin: int32 [B], slot whose tree a beam went through.
      path: int32 [B, C + 1], its nodes there, the first `count` real.
      emitted: int32 [B, C + 1], the token after each.
      count: int32 [B]; 0 for an idle slot.
      page_table: int32 [B, max_pages], from here on.
      slots: to copy.
      pages: to copy.
    """

    origin: jax.Array
    path: jax.Array
    emitted: jax.Array
    count: jax.Array
    page_table: jax.Array
    slots: Copies
    pages: Copies


def look(
    models: tuple[Transformer, Speculation],
    shape: TreeShape,
    count: int,
    state: DecodeState,
    control: Control,
) -> tuple[DecodeState, Looked, Sight]:
    """Proposes a tree for every beam, and verifies all of them in one pass.

    Args:
      models: target, and what drafts.
      shape: of the trees.
      count: N, tokens to tell of after every node, V at most.
      state: of all slots.
      control: slots without a beam have no limit above their length.
    """
    target, speculation = models
    turn = stepping.turn_of(target, shape, state, control, None)
    proposed = stepping.propose(target, speculation, shape, state, turn)
    tree, needs = proposed.tree, speculation.drafter.needs
    view = CacheView(state.pages, control.page_table, turn.lengths)
    verified = stepping.verify(target, tree, view, needs.feature_layers)
    logits_VR = verified.logits
    with jax.named_scope("likeliest"):
        top_RN, best_RN = select.top_k(logits_VR, min(count, len(logits_VR)))
        log_p_RN = top_RN - jax.nn.logsumexp(logits_VR, axis=0)[:, None]
    nodes = *tree.tokens.shape, -1
    real_BT = tree.valid & turn.active[:, None]
    wanted = stepping.successors_of(
        logits_VR,
        tree.tokens,
        real_BT,
        jnp.zeros_like(state.root),
        needs.successors,
        jnp.zeros((len(tree.tokens), 1), jnp.int32),
    )
    looked = Looked(
        kv=verified.forward.kv,
        features=tuple(verified.forward.features),
        tokens=tree.tokens,
        real=real_BT,
        best=wanted and wanted.best,
        logits=wanted and wanted.logits,
    )
    sight = Sight(
        tokens=tree.tokens,
        parents=tree.parents,
        valid=tree.valid,
        best=best_RN.reshape(nodes),
        log_probs=log_p_RN.reshape(nodes),
    )
    return dataclasses.replace(state, draft=proposed.draft), looked, sight


def go(
    speculation: Speculation, state: DecodeState, looked: Looked, moves: Moves
) -> DecodeState:
    """Lets every slot go on as its beam does.

    Args:
      speculation: whose drafter is told.
      state: after `look`.
      looked: of the same pass.
      moves: that the host chose.
    """
    state = sharing.fork(speculation, state, moves.slots, moves.pages)
    origin_B, path_BC, count_B = moves.origin, moves.path, moves.count
    pages = paging.commit(
        state.pages,
        paging.Destination(moves.page_table, state.lengths, count_B),
        jax.tree.map(lambda x: x[origin_B], looked.kv),
        path_BC,
        after=jnp.all(path_BC >= 0),
    )
    last_B1 = jnp.maximum(count_B - 1, 0)[:, None]
    active_B = count_B > 0
    newest_B = jnp.take_along_axis(moves.emitted, last_B1, axis=1)[:, 0]
    root_B = jnp.where(active_B, newest_B, state.root)
    tokens_BT = looked.tokens[origin_B]

    def on_path(x_DR):
        x_DBT = x_DR.reshape(x_DR.shape[0], *tokens_BT.shape)[:, origin_B]
        x_DBC = jnp.take_along_axis(x_DBT, path_BC[None], axis=2)
        return x_DBC.transpose(1, 2, 0)

    successors = None
    if looked.best is not None:
        successors = Successors(
            tokens_BT,
            looked.real[origin_B] & active_B[:, None],
            looked.best[origin_B],
            looked.logits[origin_B],
            jnp.take_along_axis(path_BC, last_B1, axis=1)[:, 0],
            path_BC,
        )
    with jax.named_scope("ingest"):
        committed = Committed(
            slot=None,
            tokens=jnp.take_along_axis(tokens_BT, path_BC, axis=1),
            following=moves.emitted,
            root=root_B,
            start=state.lengths,
            count=count_B,
            features=tuple(map(on_path, looked.features)),
            page_table=moves.page_table,
            successors=successors,
        )
        draft = speculation.drafter.ingest(state.draft, committed)
    return dataclasses.replace(
        state, pages=pages, lengths=state.lengths + count_B, root=root_B, draft=draft
    )
