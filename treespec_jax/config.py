"""Frozen settings that cross module borders. Unknown keys are errors.

Each class checks itself in `__post_init__` and raises `UserError` with the offending
value, so that a bad setting is found before any memory is spent.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from treespec_jax.errors import UserError

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """Builds a dataclass from a mapping and names any key it does not know.

    Args:
      cls: a dataclass.
      values: its fields; missing ones take their default.
      what: what the mapping is, for the message ("speculative", "sampling", …).

    Raises:
      UserError: an unknown key, or a missing one without default.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"unknown key {key!r} in {what}{hint} (known: {', '.join(fields)})"
            )
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise UserError(f"{what} lacks {name!r}")
    return cls(**values)


def check_int(name: str, value: Any, least: int) -> None:
    """Raises UserError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} must be a whole number >= {least}, got {value!r}")


def check_float(
    name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False
) -> None:
    """Raises UserError unless `value` is finite and in [low, high] (or (low, high])."""
    bracket = "(" if open_low else "["
    span = f"{bracket}{low:g}, {high:g}]" if high < math.inf else f">= {low:g}"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a number, got {value!r}") from None
    below = number <= low if open_low else number < low
    if not math.isfinite(number) or below or number > high:
        where = f"in {span}" if high < math.inf else span
        raise UserError(f"{name} must be a finite number {where}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one decoder (letters: see `treespec_jax`).

    Attributes:
      vocab_size: V, rows of the embedding.
      embed_dim: D, width of the residual stream.
      mlp_dim: F, width of the gated MLP.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: K; N must be a multiple of it.
      head_dim: H, even.
      max_positions: positions the model was trained for; longer input is refused.
      rope_theta: base of the rotary angles.
      norm_eps: added to the mean square in RMSNorm.
      tied_embeddings: the output head is the embedding table.
      bos_id: token put before a prompt, or None.
      eos_ids: tokens that end a text.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)

    def __post_init__(self):
        for name in [
            "vocab_size",
            "embed_dim",
            "mlp_dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ]:
            check_int(f"model.{name}", getattr(self, name), 1)
        check_float("model.rope_theta", self.rope_theta, 0, open_low=True)
        check_float("model.norm_eps", self.norm_eps, 0)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim must be even, got {self.head_dim}")
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))

    @property
    def queries_per_kv(self) -> int:
        """G = N / K."""
        return self.num_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What one request wants. Two requests of a batch may differ in all of it.

    Attributes:
      max_tokens: tokens to emit at most, >= 1.
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the smallest set of likeliest tokens with this mass, in (0, 1].
      min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1].
      seed: of the request's noise; equal seeds give equal text (32 bits).
      stop: texts that end the output (they are not part of it).
      ignore_eos: go on past the end-of-text token.
      logprobs: also return log p (natural, of the model before temperature and
        truncation) of every emitted token.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self):
        check_int("max_tokens", self.max_tokens, 1)
        check_float("temperature", self.temperature, 0)
        check_int("top_k", self.top_k, 0)
        check_float("top_p", self.top_p, 0, 1, open_low=True)
        check_float("min_p", self.min_p, 0, 1)
        check_int("seed", self.seed, 0)
        if self.seed >= 2**32:
            raise UserError(f"seed must be below 2**32, got {self.seed}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise UserError(f"stop must hold non-empty texts, got {self.stop!r}")
        object.__setattr__(self, "stop", stop)


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig:
    """How the drafter is made.

    Attributes:
      method: "none" (plain decoding) or "draft_model" (SpecInfer).
      model: path of the draft model's checkpoint, or a loaded one.
      tree: a tree shape, see `treespec_jax.trees.shapes.parse`.
      tau: temperature of the drafter's estimate that a child is right,
        softmax(score / tau); orders the paths of a dynamic tree.
    """

    method: str = "draft_model"
    model: Any = None
    tree: str = "chain:5"
    tau: float = 0.7

    METHODS = ("none", "draft_model")

    def __post_init__(self):
        if self.method not in self.METHODS:
            raise UserError(
                f"speculative method {self.method!r} is unknown; choose from "
                f"{', '.join(self.METHODS)}"
            )
        check_float("speculative tau", self.tau, 0, open_low=True)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Fixed sizes of a running engine; each decides a compiled shape.

    Attributes:
      max_batch: B, slots decoded together.
      max_len: tokens per slot, prompt and output together.
      page_size: cache rows per page, a power of two from 8 to 512.
      num_pages: pages shared by all slots; None: enough for every slot's max_len.
      steps_per_dispatch: speculation steps that run before the host looks again.
      prefill_chunks: row counts of the compiled prefill passes, ascending.
    """

    max_batch: int = 8
    max_len: int = 512
    page_size: int = 64
    num_pages: int | None = None
    steps_per_dispatch: int = 8
    prefill_chunks: tuple[int, ...] = (16, 128)

    def __post_init__(self):
        check_int("max_batch", self.max_batch, 1)
        check_int("max_len", self.max_len, 2)
        check_int("steps_per_dispatch", self.steps_per_dispatch, 1)
        size = self.page_size
        if size not in (8, 16, 32, 64, 128, 256, 512):
            raise UserError(f"page_size must be a power of two in 8..512, got {size!r}")
        if self.num_pages is not None:
            check_int("num_pages", self.num_pages, 1)
        chunks = tuple(self.prefill_chunks)
        if not chunks or list(chunks) != sorted(set(chunks)) or chunks[0] < 1:
            raise UserError(
                f"prefill_chunks must ascend from at least 1, got {chunks!r}"
            )
        object.__setattr__(self, "prefill_chunks", chunks)
