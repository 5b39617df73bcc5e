"""The loss curve of a run as a table and as a picture."""

from __future__ import annotations

import csv
import os
import pathlib


def write_csv(path: pathlib.Path, curve: list[list]) -> None:
    """Writes rows of (step, training loss, held-out loss or None), whole or not."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["step", "loss", "held_out_loss"])
        for step, loss, held_out in curve:
            last = "" if held_out is None else f"{held_out:.5f}"
            writer.writerow([step, f"{loss:.5f}", last])
    os.replace(partial, path)


def write_png(path: pathlib.Path, curve: list[list]) -> None:
    """Draws the curve."""
    # A heavy import, and not needed to train.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([r[0] for r in curve], [r[1] for r in curve], lw=0.7, label="training")
    held = [r for r in curve if r[2] is not None]
    axes.plot([r[0] for r in held], [r[2] for r in held], "o-", ms=3, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
