"""One page of HTML that shows traces; it needs no network and no other file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from treespec_jax.tracing import trace
from treespec_jax.tracing.trace import Trace

# Where the template wants its title and its data.
TITLE, DATA = "{{title}}", "{{data}}"


def render(traces: Sequence[Trace]) -> str:
    """The page of some traces, `page.html` with their JSON inside."""
    template = resources.files("treespec_jax.tracing").joinpath("page.html")
    text = template.read_text(encoding="utf-8")
    # Nothing in the data may end the element that holds it.
    data = trace.dumps(traces).replace("<", "\\u003c")
    title = html.escape(_title(traces))
    return text.replace(TITLE, title).replace(DATA, data)


def write(traces: Sequence[Trace], path: str | Path) -> None:
    """Writes an .html file."""
    Path(path).write_text(render(traces), encoding="utf-8")


def _title(traces: Sequence[Trace]) -> str:
    said = traces[0].prompt[-1][1] if traces and traces[0].prompt else ""
    start = " ".join(said.split())
    return f"{start[:60]}… · treespec-jax" if start else "treespec-jax trace"
