"""What scripts/train_lm.py does between its flags and the loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from treespec_jax.errors import UserError
from treespec_jax.training import loop, settings


def with_flags(
    config: Mapping[str, Any],
    text: Sequence[str] = (),
    vocabulary: str | None = None,
    teacher: str | None = None,
    output: str | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """The configuration as nested dicts, with the flags that were given on top.

    `text` entries replace the configuration's sources: NAME=PATH with the cleaning
    rules of the source of that name, PATH without any; *WEIGHT may follow.
    """
    values = plain(config)
    data = values.setdefault("data", {})
    if text:
        data["sources"] = _sources(text, data.get("sources", {}))
    for part, key, value in [
        ("vocabulary", "path", vocabulary),
        ("distill", "teacher", teacher),
        ("run", "output", output),
        ("optimizer", "steps", steps),
    ]:
        if value is not None:
            values.setdefault(part, {})[key] = value
    return values


def plain(value: Any) -> Any:
    """Nested dicts of a ConfigDict, which is no Mapping."""
    if hasattr(value, "items"):
        return {key: plain(inner) for key, inner in value.items()}
    return value


def _sources(text: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Sources by name, from `--text` entries."""
    sources = {}
    for i, entry in enumerate(text):
        path, star, weight = entry.rpartition("*")
        if not star:
            path = entry
        name, equals, rest = path.partition("=")
        if equals and name in known:
            source = {**known[name], "path": rest}
        else:
            name, source = f"text{i}", {"path": path}
        if star:
            try:
                source["weight"] = float(weight)
            except ValueError:
                message = f"--text={entry}: {weight!r} is not a weight"
                raise UserError(message) from None
        sources[name] = source
    return sources


def train(config: Mapping[str, Any], **overrides) -> None:
    """Runs the training that flags and file describe and prints what it came to."""
    checked = settings.build(with_flags(config, **overrides))
    result = loop.train(checked)
    if not result.finished:
        total = checked.optimizer.steps
        print(f"stopped at step {result.step} of {total}; the same command goes on")
        return
    loss = result.held_out
    print(
        f"held-out loss   {loss:.4f} nats per token (perplexity {math.exp(loss):.2f})"
    )
    print(f"best step       {result.best_step} of {result.step}")
    if result.agreement is not None:
        a = result.agreement
        print(f"agreement       {a.top1:.1%} greedy, {a.top4:.1%} in the best four")
        print(f"KL to teacher   {a.kl:.4f} nats over {a.positions} held-out tokens")
    print(f"model           {result.model_path}")
    print(f"sample          {result.sample}")
