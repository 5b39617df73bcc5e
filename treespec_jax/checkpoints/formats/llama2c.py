"""llama2.c checkpoints, version 0 (`.bin`).

Seven little-endian int32 (D, F, L, N, K, V, positions; a negative V means a separate
output head), then float32 tensors, each kind for all layers, in the order of `_layout`.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from treespec_jax.checkpoints.files import check_pointer
from treespec_jax.checkpoints.formats.protocol import Description
from treespec_jax.checkpoints.pieces import Piece, Tensors
from treespec_jax.checkpoints.tokenizers import (
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
)
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError

_HEADER = struct.Struct("<7i")
_MAGIC = 0x616B3432  # "ak42", first word of the later versions


class Llama2cFormat:
    """See `Format`."""

    expects = "a .bin file (llama2.c)"
    tokenizer_chosen = False

    def claims(self, path: Path) -> bool:
        return path.suffix == ".bin" and path.is_file()

    def describe(self, path: Path) -> Description:
        return Description(Llama2cSource(path).config, None, path, self)

    def read_tokenizer(self, path: Path) -> Tokenizer | None:
        """The tokenizer of a file: of the same stem, or the folder's only one."""
        same_stem = [path.with_suffix(".model"), path.with_suffix(".json")]
        folders = find_tokenizer(path.parent)
        found = next(filter(Path.is_file, same_stem), folders)
        return None if found in (None, path) else load_tokenizer(found)

    def open(self, description: Description) -> Tensors:
        table = name_table(description.config)
        return Tensors(Llama2cSource(description.path), table, _IGNORED)


class Llama2cSource:
    """Tensors of a llama2.c file, named "wq.3"; see `TensorSource`.

    Attributes:
      config: shape of the model; constants that the file does not hold are llama2.c's.

    Raises:
      UserError: not a version 0 file, or cut short.
    """

    dtype = "float32"

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        check_pointer(path, header)
        if len(header) < _HEADER.size:
            raise UserError(f"{path} is too short for a llama2.c checkpoint")
        values = _HEADER.unpack(header)
        if values[0] == _MAGIC:
            raise UserError(
                f"{path} is a llama2.c file of version {values[1]}; export it with "
                "--version 0"
            )
        self.config = _config(path, values)
        self._spans = {}
        offset = _HEADER.size
        for name, shape in _layout(self.config):
            self._spans[name] = offset, shape
            offset += 4 * math.prod(shape)
        if size != offset:
            raise UserError(
                f"{path} has {size} bytes, its header asks for {offset}; it is cut "
                "short or not a llama2.c checkpoint"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self._spans.items()}

    def dtypes(self) -> dict[str, str]:
        return dict.fromkeys(self._spans, self.dtype)

    def read(self, name: str, region: tuple[slice, ...]) -> np.ndarray:
        start, (_, *row) = self._spans[name]
        first, *rest = region
        size, count = math.prod(row), first.stop - first.start
        # Not memory-mapped: pages of a map would count as a second copy of the model.
        offset = start + 4 * first.start * size
        flat = np.fromfile(self.path, "<f4", count * size, offset=offset)
        return flat.reshape(count, *row)[:, *rest]

    def files(self) -> list[Path]:
        return [self.path]


def name_table(config: ModelConfig) -> list[Piece]:
    """Every tensor's place. Rotary pairs are interleaved in the file."""
    c = config
    D, F, G = c.embed_dim, c.mlp_dim, c.queries_per_kv
    rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    every = slice(None)
    pieces = [Piece("embedding", (c.vocab_size, D), "embedding")]
    for i in range(c.num_layers):
        layer = f"layers.{i}"
        qkv = f"{layer}.attention.qkv"
        pieces += [
            Piece(f"attention_norm.{i}", (D,), f"{layer}.attention_norm.scale"),
            Piece(f"wq.{i}", (rows, D), qkv, (every, slice(G)), interleaved=True),
            Piece(f"wk.{i}", (kv_rows, D), qkv, (every, G), interleaved=True),
            Piece(f"wv.{i}", (kv_rows, D), qkv, (every, G + 1)),
            Piece(f"wo.{i}", (D, rows), f"{layer}.attention.out"),
            Piece(f"mlp_norm.{i}", (D,), f"{layer}.mlp_norm.scale"),
            Piece(f"w1.{i}", (F, D), f"{layer}.mlp.gate_up", (0,)),
            Piece(f"w2.{i}", (D, F), f"{layer}.mlp.down"),
            Piece(f"w3.{i}", (F, D), f"{layer}.mlp.gate_up", (1,)),
        ]
    pieces.append(Piece("norm", (D,), "norm.scale"))
    if not c.tied_embeddings:
        pieces.append(Piece("head", (c.vocab_size, D), "head"))
    return pieces


# The angles of rotary positions, which the model computes itself.
_IGNORED = ("rotary_cos", "rotary_sin")


def _layout(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file."""
    shapes = {piece.name: piece.shape for piece in name_table(config)}
    kinds = ["attention_norm", "wq", "wk", "wv", "wo", "mlp_norm", "w1", "w2", "w3"]
    layers = [f"{kind}.{i}" for kind in kinds for i in range(config.num_layers)]
    head = [] if config.tied_embeddings else ["head"]
    shapes |= dict.fromkeys(_IGNORED, (config.max_positions, config.head_dim // 2))
    names = ["embedding", *layers, "norm", *_IGNORED, *head]
    return [(name, shapes[name]) for name in names]


def _config(path: Path, values: tuple[int, ...]) -> ModelConfig:
    dim, hidden, layers, heads, kv_heads, vocab, positions = values
    sizes = (*values[:5], abs(vocab), positions)
    plausible = all(0 < size < 1 << 24 for size in sizes)
    if not plausible or dim % heads or heads % kv_heads or (dim // heads) % 2:
        raise UserError(
            f"{path} does not begin like a llama2.c checkpoint (header {values}); "
            "check the file"
        )
    return ModelConfig(
        vocab_size=abs(vocab),
        embed_dim=dim,
        mlp_dim=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim // heads,
        max_positions=positions,
        tied_embeddings=vocab > 0,
    )
