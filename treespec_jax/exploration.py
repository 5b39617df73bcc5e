"""One short text with a picture of how it was made: `treespec_jax.explore`."""

from __future__ import annotations

import dataclasses
import tempfile
import webbrowser
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints import catalogue
from treespec_jax.checks import from_mapping
from treespec_jax.completions import Messages, Prompt
from treespec_jax.config import SamplingParams, SpeculativeConfig
from treespec_jax.engine.stats import Stats
from treespec_jax.errors import UserError
from treespec_jax.llm import LLM
from treespec_jax.pairs import Model
from treespec_jax.tracing.trace import Trace

_SPECULATIVE = {field.name for field in dataclasses.fields(SpeculativeConfig)}


@dataclasses.dataclass(frozen=True)
class Exploration:
    """A text and what was done for it.

    Attributes:
      text: what follows the prompt.
      stats: counts and times.
      trace: every step.
    """

    text: str
    stats: Stats
    trace: Trace

    def save(self, path: str | Path) -> Path:
        """Writes the picture: .html, .json, .png or .svg; see `Trace.save`."""
        return self.trace.save(path)

    def show(self) -> Path:
        """Opens the page in the browser; returns its path, a temporary file."""
        path = self.save(Path(tempfile.mkdtemp(prefix="treespec-")) / "trace.html")
        if not webbrowser.open(path.as_uri()):
            print(f"no browser was found; open {path}")
        return path


def explore(
    prompt: Prompt | Messages,
    target: str | Path | Model | LLM = catalogue.DEFAULT,
    draft: str | Path | Model | None = None,
    max_tokens: int = 13,
    **settings: Any,
) -> Exploration:
    """Continues a prompt by a few tokens and records every tree on the way.

      found = treespec_jax.explore(
          "once upon a time", max_nodes_per_level=25, max_total_nodes=200, max_time=10
      )
      print(found.text, found.stats.tokens_per_step, found.stats.bound_by)
      found.show()

    Args:
      prompt: a text, token ids, or the messages of a conversation.
      target: as for `LLM`, or an `LLM` that was made with record=True, which saves
        loading and compiling when several prompts are explored.
      draft: the drafter's checkpoint; None: the one that goes with the target.
      max_tokens: to emit at most.
      **settings: fields of `SpeculativeConfig` (tree, method, rule, …; of each step's
        tree, `max_nodes_per_level` and `max_total_nodes`) and of `SamplingParams`
        (temperature, seed, …; `max_time`, seconds: with it an `LLM` that is made here
        is compiled before they begin to count).

    Raises:
      UserError: as `LLM` and its `generate`; an `LLM` that does not record, or that is
        given together with a drafter or fields of `SpeculativeConfig`.
    """
    speculative = {} if draft is None else {"model": draft}
    speculative |= {k: v for k, v in settings.items() if k in _SPECULATIVE}
    sampling = {k: v for k, v in settings.items() if k not in _SPECULATIVE}
    sampling["max_tokens"] = max_tokens
    params = from_mapping(SamplingParams, sampling, "explore")
    if not isinstance(target, LLM):
        name = target
        llm = LLM(
            target,
            speculative=speculative,
            record=True,
            max_batch=1,
            steps_per_dispatch=1,
        )
        if params.max_time is not None:
            llm.warm_up(params)
    elif speculative:
        given = ", ".join("draft" if k == "model" else k for k in speculative)
        raise UserError(f"an LLM has its drafter already; leave out {given}")
    else:
        name, llm = "", target
    answer = llm.chat if _is_conversation(prompt) else llm.generate
    # A step a dispatch: every step has its time.
    (completion,) = answer([prompt], params, max_steps=1)
    shown = _settings(name, llm, params)
    trace = completion.trace
    trace = dataclasses.replace(trace, settings={**shown, **trace.settings})
    return Exploration(completion.text, completion.stats, trace)


def _is_conversation(prompt: Prompt | Messages) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], dict)


def _settings(name: Any, llm: LLM, params: SamplingParams) -> dict[str, Any]:
    """What the picture says of how the text was made."""
    shape = llm.engine.speculation.shape
    return {
        **({"target": str(name)} if isinstance(name, (str, Path)) and name else {}),
        "tree": f"{shape.num_nodes - 1} nodes, {shape.depth} deep",
        "temperature": params.temperature,
        "dtype": llm.dtype,
    }
