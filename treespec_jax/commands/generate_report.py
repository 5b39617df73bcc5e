"""What `generate` says of its texts: JSON, the table, and what was gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from treespec_jax.commands.settings import Experiment
from treespec_jax.measurement import tables


def completion(done) -> dict[str, Any]:
    """A `Completion` for JSON."""
    names = ["prompt", "prompt_token_ids", "text", "token_ids", "finish_reason", "seed"]
    values = {name: getattr(done, name) for name in names}
    values["stats"] = done.stats.as_dict()
    if done.others:
        values["others"] = [
            {k: v for k, v in completion(other).items() if not k.startswith("prompt")}
            for other in done.others
        ]
    for name in ("", "top_", "prompt_", "prompt_top_"):
        found = getattr(done, f"{name}logprobs")
        if found is not None:
            values[f"{name}logprobs"] = found
    return values


def verdict(texts: Sequence[Any], speeds: Mapping[str, float]) -> dict[str, Any]:
    """What a comparison with plain decoding found, for JSON.

    Args:
      texts: `exactness.TextPair`s.
      speeds: tokens per second of "tree" and "plain".
    """
    # Not above: commands start without jax.
    from treespec_jax.measurement.exactness import first_difference

    difference = None
    for pair in texts:
        position = first_difference(pair.tree, pair.plain)
        if position is not None:
            token, other = (
                ids[position] if position < len(ids) else None
                for ids in (pair.tree, pair.plain)
            )
            difference = {"prompt": pair.prompt, "at": position}
            difference |= {"tree": token, "plain": other}
            break
    return {
        "identical": difference is None,
        "first_difference": difference,
        "tokens_per_second": speeds["tree"],
        "plain_tokens_per_second": speeds["plain"],
        "speedup": speeds["tree"] / speeds["plain"] if speeds["plain"] else None,
    }


def table(
    settings: Experiment,
    stats,
    timing: Mapping[str, float],
    comparison: Mapping[str, Any] | None,
) -> str:
    """Rows for a person. There is one speed: that of the comparison, if there is one.

    Args:
      settings: as given.
      stats: of all texts.
      timing: seconds, by name.
      comparison: see `verdict`.
    """
    speed = stats.tokens_per_second
    # Before the first text, and what turned out to be wanted later.
    compiling = timing["compile_seconds"] + stats.compile_seconds
    rows = [
        ("tree", "none" if settings.plain else settings.speculative.tree),
        ("rule", stats.label),
        *([("bound by", ", ".join(stats.bound_by))] if stats.bound_by else ()),
        ("tokens", str(stats.tokens)),
        ("steps", str(stats.steps)),
        ("tokens per step", f"{stats.tokens_per_step:.2f}"),
        ("acceptance by depth", tables.percents(stats.acceptance_by_depth)),
        ("accepted by rank", tables.percents(stats.acceptance_by_rank)),
        ("accepted by source", tables.shares(stats.accepted_by_source)),
        ("load", f"{timing['load_seconds']:.2f} s"),
        ("compile", f"{compiling:.2f} s"),
    ]
    if "first_token_seconds" in timing:
        seconds = timing["first_token_seconds"]
        rows.append(("time to first token", f"{seconds:.2f} s from start"))
    if comparison:
        speed = comparison["tokens_per_second"]
        plain = comparison["plain_tokens_per_second"]
        rows.append(("plain decoding", f"{plain:.1f} tok/s"))
    else:
        rows.append(("prefill", f"{stats.prefill_seconds:.3f} s"))
        rows.append(("decode", f"{stats.decode_seconds:.3f} s"))
    rows.append(("speed", f"{speed:.1f} tok/s"))
    return tables.aligned(rows)


def gain(comparison: Mapping[str, Any], stats, settings: Experiment) -> str:
    """One line: what the tree gained over plain decoding, and whether the text is so.

    Args:
      comparison: see `verdict`.
      stats: of the tree.
      settings: as given.
    """
    text = tables.verdict(settings.as_dict())
    if comparison["identical"]:
        text = "The tokens are identical to plain decoding."
    elif text is None:
        first = comparison["first_difference"]
        text = (
            "The tokens are DIFFERENT from plain decoding: "
            "prompt {prompt}, token {at} is {tree} with the tree and {plain} without."
        ).format(**first)
    ratio = comparison["speedup"]
    if not ratio:
        return text
    passes = f"{stats.tokens_per_step:.2f} tokens per pass of the target"
    slower = (
        "" if ratio >= 1 else " (it does not pay with these models on this machine)"
    )
    return f"{passes}, {ratio:.2f} times the speed of plain decoding{slower}. {text}"
