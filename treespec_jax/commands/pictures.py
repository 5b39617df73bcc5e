"""What the flags --trace and --show_tree ask for."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl.flags import DEFINE_bool, DEFINE_string

from treespec_jax.commands.settings import Experiment
from treespec_jax.errors import UserError
from treespec_jax.tracing import build, files
from treespec_jax.tracing.terminal import TreeText, wants_colour
from treespec_jax.tracing.trace import Step, Timeline, Trace


def define() -> None:
    """Defines the flags."""
    DEFINE_string("trace", None, "file to show every tree in: .html, .json, .png, .svg")
    DEFINE_bool("show_tree", False, "print the tree of every step")


def asked(given) -> Pictures:
    """What the flags say, once the command line is parsed.

    Raises:
      UserError: a trace that cannot be written, or trees in the middle of JSON.
    """
    if given.show_tree and given.json:
        raise UserError("--show_tree prints text; leave it out, or leave out --json")
    file = None if given.trace is None else files.check(given.trace)
    return Pictures(file, given.show_tree)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Where trees are shown.

    Attributes:
      file: that traces are written to, or None.
      trees: print the tree of every step.
    """

    file: Path | None = None
    trees: bool = False

    def recorded(self, settings: Experiment) -> Experiment:
        """The settings of an engine that records, if pictures are wanted."""
        if self.file is None and not self.trees:
            return settings
        engine = dataclasses.replace(settings.engine, record=True)
        return dataclasses.replace(settings, engine=engine)

    def write(
        self,
        completions: Iterable[Any],
        settings: Mapping[str, Any],
        replays: Sequence[Mapping[str, Timeline]] = (),
        parts: Mapping[str, float] | None = None,
    ) -> None:
        """Writes the traces of `Completion`s, if a file is named.

        Args:
          completions: of an engine that records.
          settings: those to show, see `shown_settings`.
          replays: for each, or none.
          parts: seconds of the parts of a step, if they were measured.
        """
        if self.file is None:
            return
        traces: list[Trace] = []
        for number, completion in enumerate(completions):
            replay = replays[number] if replays else {}
            shown = {**settings, **completion.trace.settings}
            more = dict(settings=shown, replay=replay, parts=parts or {})
            traces.append(dataclasses.replace(completion.trace, **more))
        files.save(traces, self.file)

    def printer(self, llm) -> Callable[[list[Step]], None]:
        """Prints the steps of one text, as they come."""
        text = TreeText(
            lambda token: build.spelling(llm.tokenizer, token),
            llm.drafter.sources,
            wants_colour(sys.stdout),
        )
        count = 0

        def show(steps: list[Step]) -> None:
            nonlocal count
            for step in steps:
                count += 1
                print(text.step(count, step), end="\n\n", flush=True)

        return show


def shown_settings(in_force: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture says of the settings (`loading.in_force`), by name."""
    speculative, sampling = in_force["speculative"], in_force["sampling"]
    shown = {
        "target": in_force["target"],
        "drafter": speculative["model"] or "",
        "method": speculative["method"],
        "tree": speculative["tree"],
        "temperature": sampling["temperature"],
        "dtype": in_force["dtype"],
    }
    if speculative["method"] == "none":
        del shown["drafter"], shown["tree"]
    if sampling["temperature"]:
        shown["seed"] = sampling["seed"]
    return shown


def replays(tokenizer, generations: Mapping[str, Any]) -> list[dict[str, Timeline]]:
    """Timelines by name, for each text of generations of the same prompts.

    Args:
      tokenizer: of all of them.
      generations: by name.
    """

    def line(completion) -> Timeline:
        prompt = completion.prompt
        context = tokenizer.encode(prompt) if isinstance(prompt, str) else ()
        said = completion.token_ids, completion.arrivals
        return build.timeline(*said, tokenizer, context)

    lines = [[line(c) for c in generation] for generation in generations.values()]
    texts = zip(*lines, strict=True)
    return [dict(zip(generations, text, strict=True)) for text in texts]
