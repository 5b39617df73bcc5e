"""Loss and perplexity of a text, in plain passes over windows of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from treespec_jax.checkpoints import Description, load
from treespec_jax.engine.placement import in_arithmetic
from treespec_jax.errors import UserError
from treespec_jax.measurement.machine import versions
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.weight_types import is_int8


def windows(ids: Sequence[int], tokens: int, width: int) -> np.ndarray:
    """The first tokens of a text, int32 [windows, width]; what is over is left out.

    Raises:
      UserError: the text does not fill one window.
    """
    count = min(len(ids), tokens) // width
    if not count:
        raise UserError(
            f"the text has {len(ids)} tokens, of which {tokens} are read, and a window "
            f"{width}; give a longer text or a smaller --window"
        )
    return np.asarray(ids[: count * width], np.int32).reshape(count, width)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
      about: the model.
      dtype: of activations.
      kinds: types of weights; the first is what others are compared with.
      windows: int32 [windows, width].
      exact: of `EngineConfig`: also measure types of int8 so.
    """

    about: Description
    dtype: str
    kinds: Sequence[str]
    windows: np.ndarray
    exact: str = ""

    def measure(self) -> dict[str, Any]:
        """Figures of every type, as plain values for JSON.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        figures, first = {}, None
        for kind, model in self._models():
            arrays = jax.tree.leaves(nnx.state(model))
            losses, best = _passes(model, self.windows, kind)
            first = best if first is None else first
            figures[kind] = {
                "loss": float(losses.mean()),
                "perplexity": float(np.exp(losses.mean())),
                "same_best": float((best == first).mean()),
                "bytes": sum(array.nbytes for array in arrays),
            }
        return {
            "target": self.about.name,
            "dtype": self.dtype,
            "tokens": int(losses.size),
            "window": int(self.windows.shape[1]),
            "weights": figures,
            "versions": versions(),
        }

    def _models(self) -> Iterator[tuple[str, Transformer]]:
        """One at a time, by name."""
        for kind in self.kinds:
            model = load(self.about, self.dtype, weights=kind).model
            yield kind, model
            if self.exact and is_int8(kind):
                yield f"{kind}, {self.exact}", in_arithmetic(model, self.exact)


def _passes(model: nnx.Module, rows: np.ndarray, name: str):
    """float32 losses, nats, and int32 likeliest tokens, both [windows, width - 1]."""
    flat, width = FlatModule(model), rows.shape[1]
    mask_1TT = jnp.tril(jnp.ones((1, width, width), bool))

    @jax.jit
    def one_pass(leaves, tokens_1T):
        bound = flat.bind(leaves)
        done = bound(tokens_1T, jnp.arange(width)[None], mask_1TT)
        logits_VT = bound.logit_columns(done.hidden)[:, :-1]
        said_T = jnp.take_along_axis(logits_VT, tokens_1T[:, 1:], axis=0)[0]
        losses_T = jax.nn.logsumexp(logits_VT, axis=0) - said_T
        return losses_T, jnp.argmax(logits_VT, axis=0)

    with tqdm.tqdm(rows, desc=name, unit="window") as shown:
        passes = [jax.device_get(one_pass(flat.leaves, row[None])) for row in shown]
    losses, best = zip(*passes, strict=True)
    return np.stack(losses), np.stack(best)


def table(results: Mapping[str, Any]) -> str:
    """The figures in Markdown."""
    figures = results["weights"]
    base = next(iter(figures.values()))
    lines = [
        f"{results['target']}, {results['dtype']} activations, {results['tokens']:,} "
        f"tokens in windows of {results['window']}; jax {results['versions']['jax']}",
        "",
        "| weights | MB | loss, nats per token | against the first | perplexity | same "
        "likeliest token |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {kind} | {own['bytes'] / 1e6:.1f} | {own['loss']:.4f} | "
        f"{100 * (own['loss'] / base['loss'] - 1):+.2f} % | {own['perplexity']:.3f} | "
        f"{100 * own['same_best']:.1f} % |"
        for kind, own in figures.items()
    ]
    return "\n".join(lines)
