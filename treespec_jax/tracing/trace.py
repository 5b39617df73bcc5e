"""A trace: what a generation did step by step, and its JSON (docs/tracing.md)."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from treespec_jax.errors import UserError

FORMAT, VERSION = "treespec-jax trace", 1


@dataclasses.dataclass(frozen=True)
class Step:
    """One tree and what became of it. T counts its nodes, the root included.

    Nodes are numbered parents first; siblings stand in the order of the tree: of
    falling estimate, or as they were sampled. Log probabilities are natural, rounded
    to 3 digits, and no less than -99.

    Attributes:
      parents: T numbers; the root, node 0, is its own parent.
      tokens: T ids; the root's is the newest token before the step.
      sources: T numbers, where a node comes from (`Trace.sources`); 0 for the root.
      draft_log_prob: T numbers, the drafter's estimate that a node is right, given
        that its parent is; 0 for the root.
      target_log_prob: T numbers, log p of a node's token after its parent under the
        target, before penalties, bias and temperature; 0 for the root.
      path: accepted nodes from the root down, the root left out.
      emitted: ids of the tokens that joined the text: those of the path and then the
        target's own token, unless the text ended or a limit stopped it before.
      emitted_log_prob: the target's, as above, of each of them.
      pieces: the text that each of them added; "" where a character is not complete.
      drafted: nodes that the step computed below the root, void ones included.
      dispatch: which entry of `Trace.arrivals` brought its tokens to the host.
    """

    parents: tuple[int, ...]
    tokens: tuple[int, ...]
    sources: tuple[int, ...]
    draft_log_prob: tuple[float, ...]
    target_log_prob: tuple[float, ...]
    path: tuple[int, ...]
    emitted: tuple[int, ...]
    emitted_log_prob: tuple[float, ...]
    pieces: tuple[str, ...]
    drafted: int
    dispatch: int

    @property
    def accepted(self) -> tuple[int, ...]:
        """Numbers of the nodes that `Stats.accepted` counts: all that a step emitted
        but one token."""
        return self.path[: len(self.emitted) - 1]

    @property
    def has_bonus(self) -> bool:
        """Whether the last emitted token is the target's own, of no node."""
        return len(self.emitted) > len(self.path)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When the tokens of a text reached the host.

    Attributes:
      pieces: of text, one a token.
      arrivals: seconds since the request was submitted, and tokens that came then.
    """

    pieces: tuple[str, ...]
    arrivals: tuple[tuple[float, int], ...]


@dataclasses.dataclass(frozen=True)
class Trace:
    """All steps of one text.

    Attributes:
      prompt: pairs of a role and what it said; a role of "" for a text to continue.
      text: what the steps added.
      finish_reason: see `Completion`.
      settings: what to show of how the text was made, by name.
      sources: names of where nodes come from (`Drafter.sources`).
      vocabulary: how to show a token, by id; of all tokens in the trace.
      steps: in order.
      arrivals: seconds since the request was submitted, one for each dispatch.
      stats: `Stats.as_dict()`.
      parts: seconds of the parts of one step, by name, if they were measured.
      replay: timelines "tree" and "plain" of one text, to compare, or empty.
    """

    prompt: tuple[tuple[str, str], ...]
    text: str
    finish_reason: str
    settings: Mapping[str, Any]
    sources: tuple[str, ...]
    vocabulary: Mapping[int, str]
    steps: tuple[Step, ...]
    arrivals: tuple[float, ...]
    stats: Mapping[str, Any]
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    replay: Mapping[str, Timeline] = dataclasses.field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Writes the trace to one file: .html, .json, .png or .svg.

        Returns:
          the path.

        Raises:
          UserError: another ending, nowhere to write, or no matplotlib for a picture.
        """
        from treespec_jax.tracing import files

        return files.save([self], path)


# Columns over all nodes, over all emitted tokens, and over all accepted nodes.
_NODES = ("parents", "tokens", "sources", "draft_log_prob", "target_log_prob")
_EMITTED = ("emitted", "emitted_log_prob", "pieces")
_STEPS = ("drafted", "dispatch")


def to_json(traces: Iterable[Trace]) -> dict[str, Any]:
    """Plain values: steps as columns, so that long traces stay small."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "traces": [_trace_to_json(trace) for trace in traces],
    }


def _trace_to_json(trace: Trace) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(Trace)]
    values = {name: getattr(trace, name) for name in names}
    steps = trace.steps
    columns: dict[str, list] = {
        "node_count": [len(step.parents) for step in steps],
        "emitted_count": [len(step.emitted) for step in steps],
        "path_count": [len(step.path) for step in steps],
    }
    for name in (*_NODES, *_EMITTED, "path"):
        parts = (getattr(step, name) for step in steps)
        columns[name] = list(itertools.chain.from_iterable(parts))
    for name in _STEPS:
        columns[name] = [getattr(step, name) for step in steps]
    values["steps"] = columns
    values["vocabulary"] = {str(k): v for k, v in trace.vocabulary.items()}
    values["replay"] = {k: dataclasses.asdict(v) for k, v in trace.replay.items()}
    return values


def from_json(values: Mapping[str, Any], source: str = "the trace") -> list[Trace]:
    """Inverse of `to_json`.

    Args:
      values: as `json.load` gives them.
      source: what messages call them.

    Raises:
      UserError: no trace, or one of another version.
    """
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        made = "generate --trace=FILE.json makes one"
        raise UserError(f"{source} is not a trace; {made}")
    if values.get("version") != VERSION:
        raise UserError(
            f"{source} has version {values.get('version')!r} of the format, "
            f"{VERSION} is known; write it again"
        )
    try:
        return [_trace_from_json(trace) for trace in values["traces"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} is damaged ({error}); write it again") from None


def _trace_from_json(values: Mapping[str, Any]) -> Trace:
    values = dict(values)
    columns = values["steps"]
    nodes, emitted, path = (
        _Cuts(columns[name]) for name in ("node_count", "emitted_count", "path_count")
    )
    steps = []
    for number in range(len(columns["node_count"])):
        fields = {name: nodes.part(columns[name], number) for name in _NODES}
        fields |= {name: emitted.part(columns[name], number) for name in _EMITTED}
        fields |= {name: columns[name][number] for name in _STEPS}
        steps.append(Step(path=path.part(columns["path"], number), **fields))
    values["steps"] = tuple(steps)
    values["prompt"] = tuple((role, text) for role, text in values["prompt"])
    values["vocabulary"] = {int(k): v for k, v in values["vocabulary"].items()}
    values["replay"] = {
        name: Timeline(
            tuple(line["pieces"]),
            tuple((seconds, count) for seconds, count in line["arrivals"]),
        )
        for name, line in values["replay"].items()
    }
    for name in ("sources", "arrivals"):
        values[name] = tuple(values[name])
    return Trace(**values)


class _Cuts:
    """Where a column is cut into the parts of each step."""

    def __init__(self, counts: Sequence[int]):
        self._ends = [0, *itertools.accumulate(counts)]

    def part(self, column: Sequence, step: int) -> tuple:
        if len(column) != self._ends[-1]:
            raise ValueError(f"a column of {len(column)}, not {self._ends[-1]}")
        return tuple(column[self._ends[step] : self._ends[step + 1]])


def dumps(traces: Iterable[Trace]) -> str:
    """JSON without spaces, in ASCII, so that it can stand anywhere."""
    return json.dumps(to_json(traces), separators=(",", ":"), allow_nan=False)


def write(traces: Iterable[Trace], path: str | Path) -> None:
    """Writes a .json file."""
    Path(path).write_text(dumps(traces) + "\n", encoding="utf-8")


def read(path: str | Path) -> list[Trace]:
    """Reads what `write` wrote.

    Raises:
      UserError: no such file, no trace, or one of another version.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from None
    except ValueError:
        values = None
    return from_json(values, str(path))
