"""What must hold of models and requests, checked before weights are read; no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from treespec_jax.acceptance import compatibility
from treespec_jax.config import ModelConfig, SamplingParams, SpeculativeConfig
from treespec_jax.drafting import METHODS
from treespec_jax.errors import UserError
from treespec_jax.models.weight_types import is_int8
from treespec_jax.trees import shapes
from treespec_jax.trees.budgets import Budgets
from treespec_jax.trees.shapes import ROOT_ONLY, Ladder, TreeShape

# Length of a slot unless asked for: longer ones take memory that few texts use.
DEFAULT_MAX_LEN = 4096


class Model(Protocol):
    """A described or a loaded checkpoint."""

    config: ModelConfig


def text_length(max_len: int | None, target: Model, draft: Model | None) -> int:
    """Tokens per slot: `max_len`, or what the models can do.

    Raises:
      UserError: more than the positions of either model.
    """
    models = {"target": target}
    # What reads the target's rows is no worse beyond the positions that it knows than
    # a bad drafter.
    if draft is not None and isinstance(draft.config, ModelConfig):
        models["drafter"] = draft
    name = min(models, key=lambda n: models[n].config.max_positions)
    longest = models[name].config.max_positions
    if max_len is None:
        return min(longest, DEFAULT_MAX_LEN)
    if max_len > longest:
        raise UserError(
            f"max_len={max_len} is past the {name}'s {longest} positions; lower it"
        )
    return max_len


def resolve(config: SpeculativeConfig) -> SpeculativeConfig:
    """The same with the method and the tree that were left open filled in.

    A model drafts where one is named, else all that drafts without one. The tree is the
    method's ladder (`trees.shapes.Ladder`) where the rule takes it, else one tree: the
    method's, or the like of it that the rule takes. An unknown method gets no tree.
    """
    method = config.method or ("draft_model" if config.model else "auto")
    tree = config.tree
    if tree.strip() in ("", "auto") and method in METHODS:
        known = METHODS[method]
        like = known.tree.replace("dynamic", "allotted")
        ladder = (config.model and known.ladder_with_model) or known.ladder
        trees = ladder, known.tree, like, "chain:5"
        tree = next((name for name in trees if _takes(config, name)), known.tree)
    return dataclasses.replace(config, method=method, tree=tree)


def _takes(config: SpeculativeConfig, tree: str) -> bool:
    """Whether the rule takes trees of that name."""
    try:
        _check_rule(config, shapes.parse(tree))
    except UserError:
        return False
    return True


def _check_rule(config: SpeculativeConfig, shape: TreeShape | Ladder) -> None:
    """Raises UserError: a rule that does not take the shape, or all of a ladder."""
    if not isinstance(shape, Ladder):
        if shape.depth or config.cascade:
            compatibility.choose_proposal(
                config.rule, config.proposal, shape, config.cascade
            )
        return
    if config.rule != "exact" or config.cascade:
        what = f"cascade {config.cascade!r}" if config.cascade else config.rule
        raise UserError(
            f"a choice of trees needs the rule exact, whose text depends on no tree; "
            f"give one --tree for {what}, or leave it out"
        )
    for one in shape.shapes:
        _check_rule(config, one)


def budgets_of(config: SpeculativeConfig) -> Budgets:
    """How large its trees may be."""
    return Budgets(config.max_nodes_per_level, config.max_total_nodes)


def bound_by(config: SpeculativeConfig) -> tuple[str, ...]:
    """Names of the budgets that make its trees smaller than they would be.

    Raises:
      UserError: a malformed tree.
    """
    config = resolve(config)
    if config.method == "none":
        return ()
    return budgets_of(config).bound(shapes.parse(config.tree))


def check_speculation(config: SpeculativeConfig) -> TreeShape | Ladder:
    """The shape of the trees, once method, tree, rule and policy fit together.

    It is cut to the budgets of nodes.

    Raises:
      UserError: an unknown name, or a tree that the rule would not be lossless for.
    """
    config = resolve(config)
    if config.method not in METHODS:
        raise UserError(
            f"speculative method {config.method!r} is unknown; choose from "
            f"{', '.join(METHODS)}"
        )
    shape = shapes.parse("none" if config.method == "none" else config.tree)
    shape = budgets_of(config).cut(shape)
    _check_rule(config, shape)
    if shape.depth and config.recycle_table:
        check_table(config)
    if shape.depth and config.adaptive_temperature:
        _check_temperature(config, shape)
    return shape if shape.depth else ROOT_ONLY


def check_exact(
    exact: str, weights: str | None, dtype: str | None = None, mesh: Any = None
) -> str | None:
    """The type of weights that a setting of `EngineConfig.exact` goes with.

    Args:
      exact: the setting.
      weights: that is asked for; empty: none is.
      dtype: of activations; empty: not known yet.
      mesh: of devices; empty: one device.

    Raises:
      UserError: "bitwise" with another type than it computes in, or several devices.
    """
    if not exact:
        return weights
    if weights and not is_int8(weights):
        raise UserError(
            f'exact="bitwise" computes with int8 weights, got weights={weights!r}; '
            "leave weights out, or take int8"
        )
    if dtype and dtype != "float32":
        raise UserError(
            f'exact="bitwise" computes with float32 activations, got dtype={dtype!r}; '
            "leave dtype out"
        )
    if mesh:
        raise UserError('exact="bitwise" runs on one device; leave mesh out')
    return weights or "int8"


def _check_temperature(config: SpeculativeConfig, shape: TreeShape | Ladder) -> None:
    """Raises UserError if a temperature of the drafter's own could not work."""
    named = f"adaptive_temperature={config.adaptive_temperature!r}"
    if not METHODS[config.method].has_logits:
        known = " or ".join(name for name, m in METHODS.items() if m.has_logits)
        raise UserError(
            f"{named} needs a drafter with probabilities of its own, which method "
            f"{config.method!r} has not; leave it out, or take method {known}"
        )
    if config.cascade:
        raise UserError(
            f"{named} would change the policy of cascade {config.cascade!r}, which "
            "reads the drafter's distribution; leave one of them out"
        )
    one = shape.shapes[0] if isinstance(shape, Ladder) else shape
    proposal = compatibility.choose_proposal(config.rule, config.proposal, one)
    if proposal not in compatibility.TEMPERED:
        raise UserError(
            f"{named} changes nothing under proposal={proposal!r}, which takes the "
            "likeliest tokens at any temperature; leave it out, or take proposal="
            f"{' or '.join(map(repr, compatibility.TEMPERED))}"
        )


def check_table(config: SpeculativeConfig) -> None:
    """Raises UserError if the method has no table that a file could keep."""
    named = f"recycle_table={config.recycle_table}"
    if not METHODS[config.method].has_table:
        known = " or ".join(name for name, m in METHODS.items() if m.has_table)
        raise UserError(
            f"{named} is of no use to method {config.method!r}; leave it out, or take "
            f"method {known}"
        )
    if dict(config.options).get("scope") == "request":
        raise UserError(
            f"{named}: with scope=request every request begins without successors; "
            "leave one of them out"
        )


def check_drafter(config: SpeculativeConfig) -> None:
    """Raises UserError if the method needs a model and none is named."""
    config = resolve(config)
    if METHODS[config.method].needs_model and config.model in (None, ""):
        raise UserError(
            f"speculative method {config.method!r} needs a model; give its path"
        )


def check_tree(depth: int, max_len: int) -> None:
    """Raises UserError if a tree of this depth can never be accepted whole."""
    if depth >= max_len:
        raise UserError(
            f"a tree of depth {depth} does not fit max_len={max_len}; take a "
            "shallower one or raise max_len"
        )


def check_tokens(ids: Iterable[int], vocab_size: int) -> None:
    """Raises UserError: a token without a row in the embedding."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UserError(
                f"token id {token} is outside the vocabulary of {vocab_size}; leave it "
                "out of the prompt"
            )


def check_params(
    params: SamplingParams, vocab_size: int, eos_ids: Iterable[int]
) -> None:
    """Raises UserError: tokens that the model lacks, more of them than there are, or no
    token that is always free.

    Args:
      params: its bad words are token ids.
      vocab_size: V.
      eos_ids: tokens that end a text.
    """
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise UserError(
                f"{name}={getattr(params, name)} is more than the {vocab_size} tokens "
                "of the vocabulary; lower it"
            )
    words = params.bad_words
    tokens = {
        "logit_bias": {token for token, _ in params.logit_bias},
        "stop_token_ids": set(params.stop_token_ids),
        "bad_words": {token for word in words for token in word},
        "allowed_token_ids": set(params.allowed_token_ids or ()),
    }
    for name, ids in tokens.items():
        if ids and max(ids) >= vocab_size:
            raise UserError(
                f"{name}: token id {max(ids)} is outside the vocabulary of "
                f"{vocab_size}; leave it out"
            )
    if not (words or params.allowed_token_ids or params.min_tokens):
        return
    free = tokens["allowed_token_ids"] or set(range(vocab_size))
    free = free - {word[-1] for word in words}
    if params.min_tokens:
        free -= {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
    if not free:
        given = ", ".join(
            name
            for name in ("allowed_token_ids", "bad_words", "min_tokens")
            if getattr(params, name)
        )
        raise UserError(
            f"{given} may forbid every token at once; leave one that ends no bad word "
            "and no text"
        )


def check_policy(params: SamplingParams, shapes_: Sequence[TreeShape]) -> None:
    """Raises UserError: a policy by the tree's structure that these trees do not have.

    Args:
      params: of a request.
      shapes_: that its steps may have.
    """
    given = params.adaptive
    if given is None or not given.by_tree:
        return
    named = f"adaptive_temperature={params.adaptive_temperature!r}"
    if len(shapes_) > 1 or not shapes_[0].depth:
        has = "changes from step to step" if len(shapes_) > 1 else "is its root alone"
        raise UserError(
            f"{named} looks at the drafted tree, which {has} here; name one tree such "
            "as chain:5, or take entropy:1"
        )
    if given.form == "siblings" and isinstance(shapes_[0], shapes.BestFirstShape):
        raise UserError(
            f"{named} counts children, which a dynamic tree chooses by the same noise "
            "that its tokens are sampled with; take a fixed tree such as regular:3x2x1"
        )


def check_prompt(ids: Sequence[int], max_len: int) -> None:
    """Raises UserError: no token, or no room for a new one."""
    if not ids:
        raise UserError("the prompt is empty; give at least one token")
    if len(ids) >= max_len:
        raise UserError(
            f"the prompt has {len(ids)} tokens, max_len is {max_len}; shorten it or "
            "raise max_len"
        )
