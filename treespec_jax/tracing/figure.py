"""A still picture of a trace: the trees of a few steps, and the curves of all."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from treespec_jax.tracing.curves import (
    acceptance_by_depth,
    layout,
    reliability,
    seconds_per_dispatch,
)
from treespec_jax.tracing.terminal import visible
from treespec_jax.tracing.trace import Step, Trace

INK, MUTED, FAINT, BONUS = "#23272e", "#7a808a", "#d9d7d1", "#c8553d"
# Of sources, in order, as on the page.
SOURCES = ("#3a6ea5", "#2a8c7d", "#b7791f", "#7d5ba6", "#5b8c3a", "#a8577e")
# Trees that a picture shows at most, and rows of leaves of one.
TREES, ROWS = 3, 40
# Size of small text, and the width of a letter as a share of a tree's.
TEXT, LETTER = 8, 0.0052
KEY = "token, p of the drafter | of the target; bold: accepted; red: the target's own"


def write(traces: Sequence[Trace], path: str | Path) -> None:
    """Writes a .png or .svg of the first trace."""
    with warnings.catch_warnings():
        # The font lacks the letters of some languages; a box stands for them.
        warnings.filterwarnings("ignore", message="Glyph")
        draw(traces[0]).savefig(path, dpi=150)


def draw(trace: Trace):
    """A `matplotlib.figure.Figure`: up to three trees above four curves."""
    # Without pyplot: no global state, and no display is looked for.
    from matplotlib.figure import Figure

    chosen = chosen_steps(trace.steps)
    heights = [0.55 + 0.26 * min(ROWS, _rows(trace.steps[n])) for n in chosen]
    figure = Figure(figsize=(14, 1.2 + sum(heights) + 2.8), layout="constrained")
    figure.set_facecolor("white")
    grid = figure.add_gridspec(len(chosen) + 1, 4, height_ratios=[*heights, 2.6])
    for row, number in enumerate(chosen):
        axes = figure.add_subplot(grid[row, :])
        _tree(axes, trace, number)
        if row == 0:
            axes.set_title(KEY, loc="right", fontsize=TEXT, color=MUTED)
            _legend(axes, trace)
    last = [figure.add_subplot(grid[len(chosen), column]) for column in range(4)]
    for axes, curve in zip(last, (_tokens, _depths, _reliability, _time), strict=True):
        curve(axes, trace)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=TEXT, colors=MUTED)
    figure.suptitle(_headline(trace), fontsize=11, color=INK, x=0.01, ha="left")
    return figure


def _legend(axes, trace: Trace) -> None:
    """The colours of sources, where there is a choice."""
    from matplotlib.patches import Patch

    colours = itertools.cycle(SOURCES)
    pairs = zip(trace.sources, colours, strict=False)
    patches = [Patch(color=colour, label=name) for name, colour in pairs]
    if len(patches) > 1:
        axes.legend(handles=patches, loc="upper right", fontsize=TEXT, frameon=False)


def chosen_steps(steps: Sequence[Step]) -> list[int]:
    """Numbers of up to three steps, in order: most tokens, fewest, and the median."""
    drafted = [n for n, step in enumerate(steps) if len(step.parents) > 1]
    by_tokens = sorted(drafted, key=lambda n: (len(steps[n].emitted), -n))
    if len(by_tokens) <= TREES:
        return sorted(by_tokens)
    return sorted({by_tokens[0], by_tokens[len(by_tokens) // 2], by_tokens[-1]})


def _headline(trace: Trace) -> str:
    stats = trace.stats
    words = [
        f"{stats['tokens']} tokens in {stats['steps']} steps",
        f"{stats['tokens_per_step']:.2f} tokens per step",
        *(str(trace.settings[k]) for k in ("target", "tree") if k in trace.settings),
    ]
    return "  ·  ".join(words)


def _rows(step: Step) -> int:
    return 1 + math.ceil(max(row for _, row in layout(step)))


def _tree(axes, trace: Trace, number: int) -> None:
    """Left to right: a column a depth, a row a leaf."""
    step = trace.steps[number]
    where = layout(step)
    width = max(4.0, max(depth for depth, _ in where) + 1.0)
    ends = []
    for node, (depth, row) in enumerate(where):
        bonus = node == len(step.parents)
        accepted = bonus or node == 0 or node in step.path
        colour = BONUS if bonus else SOURCES[step.sources[node] % len(SOURCES)]
        colour = INK if node == 0 else colour
        label = _label(trace, step, node)
        ends.append(min(depth + 0.92, depth + 0.05 + LETTER * width * len(label)))
        if node > 0:
            # The target's own token stands below the last node of the path.
            parent = max((0, *step.path)) if bonus else step.parents[node]
            axes.plot(
                (ends[parent], depth - 0.03),
                (where[parent][1], row),
                color=colour if accepted else FAINT,
                linewidth=1.8 if accepted else 0.9,
            )
        axes.text(
            depth,
            row,
            label,
            fontsize=TEXT,
            family="monospace",
            va="center",
            color=colour if accepted else MUTED,
            weight="bold" if accepted else "normal",
            parse_math=False,
        )
    count = len(step.emitted)
    title = f"step {number + 1}: {len(step.parents) - 1} nodes, {count} emitted"
    axes.set_title(title, loc="left", fontsize=TEXT + 1, color=MUTED)
    axes.set_xlim(-0.05, width)
    axes.set_ylim(max(row for _, row in where) + 0.7, -0.7)
    axes.set_axis_off()


def _label(trace: Trace, step: Step, node: int) -> str:
    """Its token, and the probabilities of drafter and target."""
    bonus = node == len(step.parents)
    token = step.emitted[-1] if bonus else step.tokens[node]
    text = visible(trace.vocabulary[token])
    text = text if len(text) <= 12 else text[:11] + "…"
    if node == 0:
        return text
    if bonus:
        return f"{text} {math.exp(step.emitted_log_prob[-1]):.2f}"
    draft = math.exp(step.draft_log_prob[node])
    return f"{text} {draft:.2f}|{math.exp(step.target_log_prob[node]):.2f}"


def _title(axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=TEXT + 1, color=INK)
    axes.set_xlabel(below, fontsize=TEXT, color=MUTED)


def _tokens(axes, trace: Trace) -> None:
    counts = [len(step.emitted) for step in trace.steps]
    axes.plot(range(1, len(counts) + 1), counts, ".", color=FAINT, markersize=3)
    width = max(1, len(counts) // 30)
    if counts:
        means = np.convolve(counts, np.ones(width) / width, "valid")
        start = (1 + width) / 2
        axes.plot(np.arange(len(means)) + start, means, color=SOURCES[0])
    axes.set_ylim(bottom=0)
    _title(axes, "tokens per step", "step")


def _depths(axes, trace: Trace) -> None:
    shares = acceptance_by_depth(trace.steps)
    axes.bar(range(1, len(shares) + 1), shares, color=SOURCES[0], width=0.7)
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _title(axes, "share of steps that accept a node", "depth")


def _reliability(axes, trace: Trace) -> None:
    rows = reliability(trace.steps)
    axes.plot((0, 1), (0, 1), ":", color=MUTED, linewidth=0.9)
    sizes = [8 + 4 * math.sqrt(row["nodes"]) for row in rows]
    estimates = [row["estimate"] for row in rows]
    axes.scatter(estimates, [row["accepted"] for row in rows], sizes, SOURCES[0])
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    _title(axes, "share of nodes accepted", "the drafter's estimate")


def _time(axes, trace: Trace) -> None:
    milliseconds = [1e3 * seconds for seconds in seconds_per_dispatch(trace)]
    axes.plot(range(1, len(milliseconds) + 1), milliseconds, color=SOURCES[1])
    axes.set_ylim(bottom=0)
    _title(axes, "milliseconds per dispatch", "dispatch")
