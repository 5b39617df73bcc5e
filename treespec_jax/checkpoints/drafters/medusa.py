"""Medusa heads as they are published (FasterDecoding/Medusa); free of jax.

Head i of the file `medusa_lm_head.pt` (or `.safetensors`) has L residual blocks
`{i}.{j}.linear.weight` [D, D] and `.bias` [D], and a matrix `{i}.{L}.weight` [V, D].
They read the output of the target's final norm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from treespec_jax.checkpoints.drafters.description import DrafterDescription, Target
from treespec_jax.checkpoints.files import read_json
from treespec_jax.checkpoints.pieces import Piece, Tensors, TensorSource
from treespec_jax.checkpoints.safetensors_source import SafetensorsSource
from treespec_jax.checkpoints.torch_file import TorchFile
from treespec_jax.errors import UserError
from treespec_jax.models.drafter_config import EagleOptions, MedusaConfig

FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.weight")


class PublishedMedusa:
    """See `DrafterFormat`."""

    def method(self, path: Path) -> str:
        return "medusa" if _file(path) is not None else ""

    def describe(
        self, path: Path, target: Target, options: EagleOptions
    ) -> DrafterDescription:
        if options != EagleOptions():
            raise UserError(f"{path} holds Medusa heads, which have no options")
        source = _open(path)
        config = _config(source, target)
        notes = ()
        about = _file(path).with_name("config.json")
        if about.is_file():
            said = read_json(about).get("medusa_num_heads")
            if said is not None and said != config.heads:
                notes = (
                    f"{about} says medusa_num_heads={said}; the weights have "
                    f"{config.heads} heads, which are used",
                )
        return DrafterDescription("medusa", config, path, self, source.dtype, notes)

    def open(self, description: DrafterDescription) -> Tensors:
        return Tensors(_open(description.path), name_table(description.config))

    def token_ids(self, description: DrafterDescription) -> np.ndarray:
        raise UserError(f"{description.path}: Medusa heads score all tokens")


def name_table(config: MedusaConfig) -> list[Piece]:
    """Where every tensor goes."""
    D, L = config.target_dim, config.blocks
    pieces = []
    for i in range(config.heads):
        for j in range(L):
            block = f"{i}.{j}.linear"
            pieces += [
                Piece(f"{block}.weight", (D, D), "weight", (i, j)),
                Piece(f"{block}.bias", (D,), "bias", (i, j)),
            ]
        pieces.append(Piece(f"{i}.{L}.weight", (config.vocab_size, D), "head", (i,)))
    return pieces


def _config(source: TensorSource, target: Target) -> MedusaConfig:
    shapes: Mapping[str, tuple[int, ...]] = source.shapes()
    blocks = [tuple(map(int, m.groups())) for m in map(_BLOCK.fullmatch, shapes) if m]
    if not blocks:
        raise UserError(
            f"{source.path}: tensor 0.0.linear.weight is missing, which Medusa heads "
            "have; the file holds something else"
        )
    heads, count = (1 + max(numbers) for numbers in zip(*blocks, strict=True))
    matrix = f"0.{count}.weight"
    if len(shapes.get(matrix, ())) != 2:
        raise UserError(
            f"{source.path}: tensor {matrix} is missing, the matrix of a head of "
            f"{count} blocks; the file is incomplete"
        )
    vocab, width = shapes[matrix]
    return MedusaConfig(
        heads=heads,
        blocks=count,
        target_dim=width,
        target_vocab=vocab,
        vocab_size=vocab,
        target_layers=target.config.num_layers,
        shared_head=False,
    )


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.name in FILES else None
    return next(filter(Path.is_file, (path / name for name in FILES)), None)


def _open(path: Path) -> TensorSource:
    file = _file(path)
    if file.suffix == ".pt":
        return TorchFile(file)
    return SafetensorsSource(file.parent, [file])
