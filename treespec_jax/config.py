"""Frozen settings that cross module borders. Unknown keys are errors.

Each class checks itself in `__post_init__` and raises `UserError` with the offending
value, so that a bad setting is found before any memory is spent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from treespec_jax import adaptive
from treespec_jax.checks import (
    as_int,
    check_bool,
    check_float,
    check_int,
    check_ints,
    check_optional,
    from_mapping,
)
from treespec_jax.errors import UserError
from treespec_jax.params import SamplingParams

__all__ = [
    "DEFAULT_TAU",
    "EngineConfig",
    "EngineSettings",
    "ModelConfig",
    "RotaryConfig",
    "SamplingParams",
    "SpeculativeConfig",
]

# Temperature of a drafter's estimates where none was fitted.
DEFAULT_TAU = 0.7


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions (Su et al., 2104.09864) and how they are stretched.

    Attributes:
      theta: base of the angles.
      scaling: "none"; "linear" divides every frequency by `factor` (Chen et al.,
        2306.15595); "llama3" the low ones only (Llama 3.1, 2407.21783); "yarn" blends
        by wavelength and scales cosines and sines (Peng et al., 2309.00071); "factors"
        divides each frequency by its own of `factors`.
      factor: how many times longer the text may be.
      original_max_positions: of the model before stretching; llama3 and yarn need it.
      low_freq_factor: llama3: rotations over the original length below which a
        frequency is divided by `factor`.
      high_freq_factor: llama3: rotations above which it stays.
      beta_fast: yarn: rotations over the original length above which it stays.
      beta_slow: yarn: rotations below which it is divided.
      truncate: yarn: both ends of the blend are rounded to whole dimensions.
      attention_factor: yarn: multiplies cosines and sines; None: 0.1 ln(factor) + 1,
        or what `mscale` and `mscale_all_dim` give.
      mscale: yarn: with `mscale_all_dim`, the factor is (0.1 mscale ln(factor) + 1) /
        (0.1 mscale_all_dim ln(factor) + 1) (DeepSeek-V2, 2405.04434).
      mscale_all_dim: see `mscale`.
      factors: of "factors", one for each pair of dimensions, H/2.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    factors: tuple[float, ...] = ()

    SCALINGS: ClassVar = ("none", "linear", "llama3", "yarn", "factors")

    def __post_init__(self):
        if self.scaling not in self.SCALINGS:
            raise UserError(
                f"rotary.scaling {self.scaling!r} is unknown; choose from "
                f"{', '.join(self.SCALINGS)}"
            )
        least = 1 if self.scaling == "yarn" else 0
        # Widening a head of 8 to one of 128 takes the sixteenth power of it.
        check_float("rotary.theta", self.theta, least, open_low=True, wide=True)
        check_float("rotary.factor", self.factor, 0, open_low=True)
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            check_float(f"rotary.{name}", getattr(self, name), 0, open_low=True)
        check_optional("rotary.attention_factor", self.attention_factor)
        for name in ("mscale", "mscale_all_dim"):
            check_float(f"rotary.{name}", getattr(self, name) or 0, 0)
        check_bool("rotary.truncate", self.truncate)
        if self.scaling in ("none", "factors") and self.factor != 1:
            raise UserError(
                f"rotary.factor={self.factor} needs a rotary.scaling of one factor"
            )
        object.__setattr__(self, "factors", tuple(self.factors))
        for value in self.factors:
            check_float("rotary.factors", value, 0, open_low=True)
        if bool(self.factors) != (self.scaling == "factors"):
            raise UserError(
                f"rotary.factors and rotary.scaling={self.scaling!r} do not belong "
                "together"
            )
        if self.original_max_positions is not None:
            check_int("rotary.original_max_positions", self.original_max_positions, 1)
        elif self.scaling in ("llama3", "yarn"):
            raise UserError(
                f"rotary.scaling {self.scaling!r} needs rotary.original_max_positions"
            )
        if self.scaling == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"rotary.low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )


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
      rotary: positions of all layers but the local ones.
      local_rotary: positions of the local layers; None: as `rotary`.
      window: rows that a local layer sees, itself included.
      local_layers: ascending indices of the layers that see only `window`.
      norm_eps: added to the mean square in RMSNorm.
      tied_embeddings: the output head is the embedding table.
      scaled_embeddings: embeddings are multiplied by sqrt(D).
      qkv_bias: queries, keys and values have a bias.
      qk_norm: every query and key head is normalised over H before rotary.
      post_norms: the outputs of attention and MLP are normalised too.
      unit_offset_norms: norms multiply by 1 + w.
      activation: of the MLP's gate, "silu" or "gelu_tanh".
      attention_scale: multiplies attention scores; None: 1 / sqrt(H).
      attention_soft_cap: scores become cap · tanh(score / cap).
      logit_soft_cap: the same of the logits.
      family: name of the table that named the weights; nothing hangs on it here.
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
    rotary: RotaryConfig = RotaryConfig()
    local_rotary: RotaryConfig | None = None
    window: int | None = None
    local_layers: tuple[int, ...] = ()
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    scaled_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    unit_offset_norms: bool = False
    activation: str = "silu"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    family: str = "llama"
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)

    ACTIVATIONS: ClassVar = ("silu", "gelu_tanh")
    # Of the parameters.
    SIZES: ClassVar = (
        "vocab_size",
        "embed_dim",
        "mlp_dim",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    )

    def __post_init__(self):
        for name in (*self.SIZES, "max_positions"):
            check_int(f"model.{name}", getattr(self, name), 1)
        check_float("model.norm_eps", self.norm_eps, 0)
        for name in [
            "tied_embeddings",
            "scaled_embeddings",
            "qkv_bias",
            "qk_norm",
            "post_norms",
            "unit_offset_norms",
        ]:
            check_bool(f"model.{name}", getattr(self, name))
        for name in ("attention_scale", "attention_soft_cap", "logit_soft_cap"):
            check_optional(f"model.{name}", getattr(self, name))
        if self.activation not in self.ACTIVATIONS:
            raise UserError(
                f"model.activation {self.activation!r} is unknown; choose from "
                f"{', '.join(self.ACTIVATIONS)}"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim must be even, got {self.head_dim}")
        for name in ("rotary", "local_rotary"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = from_mapping(RotaryConfig, value, f"model.{name}")
                object.__setattr__(self, name, value)
            elif not isinstance(value, RotaryConfig) and (value or name == "rotary"):
                raise UserError(f"model.{name} must hold its settings, got {value!r}")
            if value and value.factors and 2 * len(value.factors) != self.head_dim:
                raise UserError(
                    f"model.{name} has {len(value.factors)} factors, half of "
                    f"head_dim={self.head_dim} are needed"
                )
        object.__setattr__(self, "local_layers", tuple(self.local_layers))
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        self._check_layers()

    def _check_layers(self):
        local = self.local_layers
        for index in local:
            check_int("model.local_layers", index, 0)
        if list(local) != sorted(set(local)) or (
            local and local[-1] >= self.num_layers
        ):
            raise UserError(
                "model.local_layers must ascend and lie below "
                f"num_layers={self.num_layers}, got {list(local)}"
            )
        if self.window is not None:
            check_int("model.window", self.window, 1)
        if (self.window is None) == bool(local):
            raise UserError(
                f"model.window={self.window} and local_layers={list(local)} must be "
                "given together"
            )
        if self.local_rotary is not None and not local:
            raise UserError("model.local_rotary needs model.local_layers")

    @property
    def queries_per_kv(self) -> int:
        """G = N / K."""
        return self.num_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig:
    """How a text is speculated on. Names are checked by `limits.check_speculation`.

    Attributes:
      method: what drafts, one of `drafting.METHODS`; "none" is plain decoding, "" the
        one that goes with the target: the catalogue's, a draft model if one is named,
        else "auto".
      model: path or name of the draft model's checkpoint (`checkpoints.names`), or a
        loaded one; None for methods without a model.
      tree: a tree shape, see `treespec_jax.trees.shapes.parse`; "": the method's.
      max_nodes_per_level: drafted nodes of equal depth at most; a larger tree is cut
        (`trees.budgets`). None: as many as the tree has.
      max_total_nodes: drafted nodes of a tree at most, likewise.
      tau: temperature of the drafter's estimate that a child is right,
        softmax(score / tau); orders the paths of a dynamic tree. None: the one that
        scripts/calibrate_drafter.py left beside the drafter, else DEFAULT_TAU.
      adaptive_temperature: "depth:0.9", "siblings:0.2" or "entropy:1": the temperature
        that the drafter proposes by, as a function of a node's place in the tree, see
        `treespec_jax.adaptive`. Texts stay as lossless as the rule is: it sees the
        distribution that was sampled from. "": that of the request.
      rule: which drafted tokens are kept: "exact" (the text of plain decoding, token
        for token), "token", "block", "traversal", "terminal" (different text, same
        distribution) or "typical" (lossy), see `treespec_jax.acceptance`.
      proposal: how the drafter proposes the nodes of a tree, see
        `acceptance.compatibility`; "": as the rule usually has it.
      cascade: policy between drafter and target, one of `compatibility.CASCADES`;
        LOSSY against the target (`acceptance.cascade`). "": the target's own.
      alpha: of the cascade, in [0, 1]; larger ones trust the drafter more.
      typical_eps: under the typical rule a token this likely always passes, in (0, 1].
      typical_delta: its bound is min(eps, delta exp(-entropy)), in (0, 1].
      options: settings of the method itself, a mapping by name, kept as sorted pairs;
        each drafter says which it has.
      recycle_table: file of successors that methods "recycle" and "auto" begin with, if
        it is there; `LLM.save_recycle_table` writes it. "": they begin with none.
      check_drafter: a drafter over the target's rows is tried on text of the target's
        own when it is loaded, and refused if it is wired wrongly (`drafting.wiring`);
        those of the catalogue are known to be good.
    """

    method: str = ""
    model: Any = None
    tree: str = ""
    max_nodes_per_level: int | None = None
    max_total_nodes: int | None = None
    tau: float | None = None
    adaptive_temperature: str = ""
    rule: str = "exact"
    proposal: str = ""
    cascade: str = ""
    alpha: float = 0.1
    typical_eps: float = 0.09
    typical_delta: float = 0.3
    options: tuple[tuple[str, Any], ...] = ()
    recycle_table: str = ""
    check_drafter: bool = True

    def __post_init__(self):
        check_bool("speculative check_drafter", self.check_drafter)
        table = self.recycle_table
        if isinstance(table, Path):
            object.__setattr__(self, "recycle_table", str(table))
        elif not isinstance(table, str):
            message = f"speculative recycle_table must be a path, got {table!r}"
            raise UserError(message)
        for name in ("method", "tree", "rule", "proposal", "cascade"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise UserError(f"speculative {name} must be a text, got {value!r}")
        for name in ("max_nodes_per_level", "max_total_nodes"):
            if getattr(self, name) is not None:
                count = as_int(f"speculative {name}", getattr(self, name), 1)
                object.__setattr__(self, name, count)
        check_optional("speculative tau", self.tau)
        adaptive.parse("speculative adaptive_temperature", self.adaptive_temperature)
        check_float("speculative alpha", self.alpha, 0, 1)
        for name in ("typical_eps", "typical_delta"):
            check_float(f"speculative {name}", getattr(self, name), 0, 1, open_low=True)
        options = self.options
        try:
            items = options.items() if isinstance(options, Mapping) else options
            pairs = sorted((str(name), value) for name, value in items)
        except (TypeError, ValueError):
            raise UserError(
                f"speculative options must map names to values, got {options!r}"
            ) from None
        object.__setattr__(self, "options", tuple(pairs))


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
      lanes: numbers in a row of the cache are padded to a multiple of it; None: 128 on
        a TPU, whose kernel reads whole lanes, else 1. A key and its value share a row
        that has room for both, as heads of up to 64 have there.
      cache_dtype: of keys and values: float32, bfloat16, float16, or "int8", which
        keeps them rounded, with a scale per row and head: lossy, in a half of
        bfloat16's memory.
      record: keep what became of every drafted tree (`Completion.records`).
      prefix_cache: texts that begin alike share the pages of their common beginning,
        also with texts that ended while nobody needed their pages.
      exact: "bitwise": the target's logits, keys and values have the same bits in
        every program, whatever the tree, the batch, the slot, the page size and the
        chunks of a prompt. On one CPU, with int8 weights, float32 activations and an
        int8 cache. Empty: they differ in their last bits, by the order of sums.
    """

    max_batch: int = 8
    max_len: int = 512
    page_size: int = 64
    num_pages: int | None = None
    steps_per_dispatch: int = 8
    prefill_chunks: tuple[int, ...] = (16, 128)
    lanes: int | None = None
    cache_dtype: str = "float32"
    record: bool = False
    prefix_cache: bool = True
    exact: str = ""

    CACHE_DTYPES: ClassVar = ("float32", "bfloat16", "float16", "int8")
    EXACT: ClassVar = ("", "bitwise")

    def __post_init__(self):
        for name, least in (
            ("max_batch", 1),
            ("max_len", 2),
            ("steps_per_dispatch", 1),
        ):
            object.__setattr__(self, name, as_int(name, getattr(self, name), least))
        for name in ("num_pages", "lanes"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_int(name, getattr(self, name), 1))
        size = as_int("page_size", self.page_size, 1)
        object.__setattr__(self, "page_size", size)
        if size not in (8, 16, 32, 64, 128, 256, 512):
            raise UserError(f"page_size must be a power of two in 8..512, got {size!r}")
        if self.cache_dtype not in self.CACHE_DTYPES:
            raise UserError(
                f"cache_dtype must be one of {', '.join(self.CACHE_DTYPES)}, got "
                f"{self.cache_dtype!r}"
            )
        if self.exact not in self.EXACT:
            raise UserError(f'exact must be "bitwise" or empty, got {self.exact!r}')
        if self.exact and self.cache_dtype != "int8":
            raise UserError(
                f'exact="bitwise" keeps keys and values in int8, got cache_dtype='
                f"{self.cache_dtype!r}; leave cache_dtype out"
            )
        check_bool("record", self.record)
        check_bool("prefix_cache", self.prefix_cache)
        chunks = check_ints("prefill_chunks", self.prefill_chunks, 1)
        if not chunks or list(chunks) != sorted(set(chunks)):
            raise UserError(
                f"prefill_chunks must ascend from at least 1, got {chunks!r}"
            )
        object.__setattr__(self, "prefill_chunks", chunks)


@dataclasses.dataclass(frozen=True)
class EngineSettings(EngineConfig):
    """`EngineConfig` before the models are known.

    Attributes:
      max_len: None: what the models can do, 4096 at most.
      cache_dtype: empty: the dtype of the activations, or what `exact` wants.
    """

    max_len: int | None = None
    cache_dtype: str = ""

    def __post_init__(self):
        checked = self.resolve(self.max_len or 4096, "float32")
        object.__setattr__(self, "prefill_chunks", checked.prefill_chunks)

    def resolve(self, max_len: int, dtype: str) -> EngineConfig:
        """With what the models decide filled in.

        Args:
          max_len: tokens per slot.
          dtype: of activations.
        """
        cache_dtype = self.cache_dtype or ("int8" if self.exact else dtype)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return EngineConfig(
            **{**values, "max_len": max_len, "cache_dtype": cache_dtype}
        )
