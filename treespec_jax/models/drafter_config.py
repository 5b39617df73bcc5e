"""Shapes of drafters that read a target's hidden rows; free of jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from treespec_jax.checks import check_bool, check_int, from_mapping
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """An EAGLE drafter: one decoder layer over embeddings and the target's rows.

    Attributes:
      generation: 1 reads [embedding; feature] through one matrix (EAGLE-1, Li et al.,
        2401.15077, and EAGLE-2, 2406.16858, which has its weights); 3 fuses several
        features and attends over [embedding; fused] (EAGLE-3, 2503.01840).
      layer: the decoder layer, of one layer; its `vocab_size` is Vd, the number of
        tokens that the drafter can propose, its `embed_dim` is D.
      target_vocab: V, rows of the embedding.
      target_dim: width of a feature.
      feature_layers: numbers of the target's layers whose outputs are read, ascending;
        the number of layers stands for the output of its final norm.
      shared_embedding: the embedding is the target's.
      shared_head: the head is the target's, or rows of it.
      input_norm: generation 1: the layer normalises what it attends over.
      fc_bias: the first matrix has a bias.
      norm_before_fc: of generation 3, what is normalised before the first matrix: ""
        nothing, "each" feature by a norm of its own, or "all" of them together.
      norm_before_residual: of generation 3, the residual is the normed row.
    """

    generation: int
    layer: ModelConfig
    target_vocab: int
    target_dim: int
    feature_layers: tuple[int, ...]
    shared_embedding: bool = True
    shared_head: bool = True
    input_norm: bool = False
    fc_bias: bool = False
    norm_before_fc: str = ""
    norm_before_residual: bool = False

    def __post_init__(self):
        if self.generation not in (1, 3):
            raise UserError(f"eagle.generation must be 1 or 3, got {self.generation!r}")
        if isinstance(self.layer, Mapping):
            layer = from_mapping(ModelConfig, self.layer, "eagle.layer")
            object.__setattr__(self, "layer", layer)
        for name in ("target_vocab", "target_dim"):
            check_int(f"eagle.{name}", getattr(self, name), 1)
        for name in (
            "shared_embedding",
            "shared_head",
            "input_norm",
            "fc_bias",
            "norm_before_residual",
        ):
            check_bool(f"eagle.{name}", getattr(self, name))
        if self.norm_before_fc not in ("", "each", "all"):
            raise UserError(
                "eagle.norm_before_fc must be '', 'each' or 'all', got "
                f"{self.norm_before_fc!r}"
            )
        layers = check_layers("eagle.feature_layers", self.feature_layers)
        object.__setattr__(self, "feature_layers", layers)
        if self.generation == 1 and len(layers) != 1:
            raise UserError(
                f"eagle.feature_layers={list(layers)}: generation 1 reads one layer"
            )
        if self.layer.num_layers != 1:
            raise UserError(
                f"eagle.layer.num_layers must be 1, got {self.layer.num_layers}"
            )
        if self.layer.vocab_size > self.target_vocab:
            raise UserError(
                f"eagle.layer.vocab_size={self.layer.vocab_size} exceeds the target's "
                f"{self.target_vocab} tokens"
            )

    @property
    def draft_vocab(self) -> int:
        """Vd."""
        return self.layer.vocab_size

    @property
    def reduced(self) -> bool:
        """Whether the drafter knows fewer tokens than the target."""
        return self.layer.vocab_size < self.target_vocab


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """Medusa heads (Cai et al., 2401.10774) over the target's last normed row.

    Attributes:
      heads: K; head k guesses the token k + 2 places after the row's own.
      blocks: L, residual blocks x + silu(W x + b) of each head.
      target_dim: D, width of the row.
      target_vocab: V.
      vocab_size: Vd, the number of tokens that the heads can propose.
      target_layers: of the target; its final norm's output is read.
      shared_head: all heads end in the target's output matrix, or rows of it; else each
        has one of its own.
      reads_root: the heads also read the token after the row's (`models.medusa`).
        Published heads do not.
    """

    heads: int
    blocks: int
    target_dim: int
    target_vocab: int
    vocab_size: int
    target_layers: int
    shared_head: bool = True
    reads_root: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("shared_head", "reads_root"):
                check_bool("medusa.shared_head", value)
            else:
                check_int(f"medusa.{field.name}", value, 1)
        if self.vocab_size > self.target_vocab:
            raise UserError(
                f"medusa.vocab_size={self.vocab_size} exceeds the target's "
                f"{self.target_vocab} tokens"
            )

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """As of `EagleConfig`."""
        return (self.target_layers,)

    @property
    def shared_embedding(self) -> bool:
        """Whether they read the target's embedding."""
        return self.reads_root

    @property
    def draft_vocab(self) -> int:
        """Vd."""
        return self.vocab_size

    @property
    def reduced(self) -> bool:
        """Whether the heads know fewer tokens than the target."""
        return self.vocab_size < self.target_vocab


HeadConfig = EagleConfig | MedusaConfig


@dataclasses.dataclass(frozen=True)
class EagleOptions:
    """What a user may say of an EAGLE checkpoint that does not say so itself.

    Attributes:
      feature_layers: as of `EagleConfig`; (): as the checkpoint says, or its publisher
        usually has it.
      norm_before_residual: the same; None: as the checkpoint says.
    """

    feature_layers: tuple[int, ...] = ()
    norm_before_residual: bool | None = None

    def __post_init__(self):
        layers = self.feature_layers
        if not isinstance(layers, (list, tuple)):
            raise UserError(
                f"feature_layers must be a list of layer numbers, got {layers!r}"
            )
        if layers:
            layers = check_layers("feature_layers", layers)
        object.__setattr__(self, "feature_layers", tuple(layers))
        if self.norm_before_residual is not None:
            check_bool("norm_before_residual", self.norm_before_residual)


def check_layers(name: str, layers: Any) -> tuple[int, ...]:
    """Layer numbers as a tuple.

    Raises:
      UserError: they are none, or do not ascend.
    """
    layers = tuple(layers)
    for index in layers:
        check_int(name, index, 0)
    if not layers or list(layers) != sorted(set(layers)):
        raise UserError(f"{name} must ascend, got {list(layers)}")
    return layers
