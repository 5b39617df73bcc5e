"""The curve of a run as a table and as a picture."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Sequence


def write_csv(path: pathlib.Path, curve: list[list]) -> None:
    """Writes rows of (step, training loss, held-out loss or None), whole or not."""
    lines = [[step, *map(_number, losses)] for step, *losses in curve]
    _write(path, ["step", "loss", "held_out_loss"], lines)


def write_drafter_csv(
    path: pathlib.Path, curve: list[list], batch_tokens: int, shapes: Sequence[str]
) -> None:
    """Writes a drafter's curve, whole or not.

    Args:
      path: of the file.
      curve: rows of (step, training loss, held-out loss or None, tokens per step by
        shape or None).
      batch_tokens: seen in a step.
      shapes: columns of tokens per step.
    """
    lines = []
    for step, loss, held_out, per_step in curve:
        values = [loss, held_out, *((per_step or {}).get(name) for name in shapes)]
        lines.append([step, step * batch_tokens, *map(_number, values)])
    _write(path, ["step", "tokens", "loss", "held_out_loss", *shapes], lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _write(path: pathlib.Path, header: list[str], lines: list[list]) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)
    os.replace(partial, path)


def write_png(path: pathlib.Path, curve: list[list]) -> None:
    """Plots the curve of `write_csv`."""
    figure = _figure(height=4)
    axes = figure.subplots()
    _draw_losses(axes, curve, "loss (nats per token)")
    axes.set_xlabel("step")
    figure.savefig(path, dpi=120)


def write_drafter_png(path: pathlib.Path, curve: list[list], batch_tokens: int) -> None:
    """Plots the curve of `write_drafter_csv`: losses, and tokens per step below."""
    figure = _figure(height=7)
    above, below = figure.subplots(2, sharex=True)
    _draw_losses(above, curve, "loss (nats per prediction)")
    measured = [(row[0], row[3]) for row in curve if row[3]]
    for name in measured[-1][1] if measured else ():
        values = [per_step[name] for _, per_step in measured]
        below.plot([step for step, _ in measured], values, "o-", ms=3, label=name)
    below.set_xlabel("step")
    below.set_ylabel("tokens per step, held out")
    below.grid(alpha=0.3)
    if measured:
        below.legend()
    millions = batch_tokens / 1e6
    tokens = above.secondary_xaxis(
        "top", functions=(lambda x: x * millions, lambda x: x / millions)
    )
    tokens.set_xlabel("million tokens")
    figure.savefig(path, dpi=120)


def _figure(height: float):
    # A heavy import, and not needed to train.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_losses(axes, curve: list[list], label: str) -> None:
    axes.plot([r[0] for r in curve], [r[1] for r in curve], lw=0.7, label="training")
    held = [r for r in curve if r[2] is not None]
    axes.plot([r[0] for r in held], [r[2] for r in held], "o-", ms=3, label="held out")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
