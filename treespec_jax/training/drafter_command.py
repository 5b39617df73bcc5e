"""What `train_drafter` does between its flags and the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from treespec_jax.training import drafter_loop, drafter_settings
from treespec_jax.training.command import plain


def with_flags(
    config: Mapping[str, Any],
    method: str | None = None,
    target: str | None = None,
    answers: Sequence[str] = (),
    text: Sequence[str] = (),
    **run: Any,
) -> dict[str, Any]:
    """The configuration as nested dicts, with the flags that were given on top.

    Args:
      config: of a file.
      method: what drafts.
      target: checkpoint.
      answers: folders; they take the place of all the file's data, as `text` does.
      text: files.
      **run: `steps`, `max_minutes` and `output`; None is not given.
    """
    values = plain(config)
    data = values.setdefault("data", {})
    if answers or text:
        data["answers"], data["text"] = tuple(answers), tuple(text)
    for part, key, value in [
        (values, "method", method),
        (values, "target", target),
        (values.setdefault("optimizer", {}), "steps", run.get("steps")),
        (values.setdefault("run", {}), "max_minutes", run.get("max_minutes")),
        (values["run"], "output", run.get("output")),
    ]:
        if value is not None:
            part[key] = value
    return values


def train(config: Mapping[str, Any], **given: Any) -> None:
    """Runs the training that flags and file describe and prints what it came to."""
    checked = drafter_settings.build(with_flags(config, **given))
    result = drafter_loop.train(checked)
    if not result.finished:
        print(f"stopped at step {result.step}; the same command goes on")
        return
    print("\n".join(result.report.lines()))
    print(f"drafter: {result.path}")
