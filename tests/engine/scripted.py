"""A model that says what it is told to: each token has one likeliest successor."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from treespec_jax.checkpoints import LoadedModel
from treespec_jax.config import ModelConfig
from treespec_jax.models.transformer import Transformer


def scripted(tokenizer, successors: dict[int, int], **changes) -> LoadedModel:
    """A one-layer model whose blocks add nothing, so that logits follow one token.

    Args:
      tokenizer: of its vocabulary, or None for 320 tokens without one.
      successors: likeliest token after a token; others are followed by anything.
      **changes: of the configuration.
    """
    settings = dict(
        vocab_size=tokenizer.vocab_size if tokenizer else 320,
        embed_dim=64,
        mlp_dim=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=96,
        bos_id=tokenizer.bos_id if tokenizer else None,
        eos_ids=tokenizer.eos_ids if tokenizer else (2,),
    )
    config = ModelConfig(**{**settings, **changes})
    model = Transformer(config, rngs=nnx.Rngs(0))
    layer = model.layers[0]
    layer.attention.out[...] = jnp.zeros_like(layer.attention.out[...])
    layer.mlp.down[...] = jnp.zeros_like(layer.mlp.down[...])
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(config.vocab_size, 64)).astype(np.float32)
    head = np.zeros_like(rows)
    for token, successor in successors.items():
        head[successor] += rows[token] / 8
    model.embedding[...] = jnp.asarray(rows)
    model.head[...] = jnp.asarray(head)
    return LoadedModel(config, model, tokenizer, "scripted", np.dtype("float32"))


def follow(tokens) -> dict[int, int]:
    """Successors that make a text of different tokens."""
    assert len(set(tokens)) == len(tokens)
    return dict(zip(tokens[:-1], tokens[1:], strict=True))


@dataclasses.dataclass(frozen=True)
class Script:
    """A prompt and what has to follow it.

    Attributes:
      prompt: text.
      prompt_ids: its tokens.
      ids: the tokens after it, an end of text last.
      text: of those tokens.
    """

    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    text: str


def write(tokenizer) -> Script:
    """Words with characters of two, three and four bytes between them."""
    prompt = "the cat"
    prompt_ids = tokenizer.encode(prompt)
    size = range(tokenizer.vocab_size)
    pieces = {tokenizer.piece(token): token for token in size}
    words = [
        token
        for piece, token in pieces.items()
        if piece[0] == "\u2581" and len(piece) > 1 and token not in prompt_ids
    ][-8:]

    def spell(character):
        return [pieces[f"<0x{byte:02X}>"] for byte in character.encode()]

    ids = [*words[:2], *spell("\u00e9"), words[2], *spell("\u20ac"), *words[3:5]]
    ids += [*spell("\U0001f600"), *words[5:], tokenizer.eos_ids[0]]
    start = len(tokenizer.decode(prompt_ids))
    text = tokenizer.decode([*prompt_ids, *ids])[start:]
    assert len(words) == 8 and "\ufffd" not in text
    return Script(prompt, prompt_ids, ids, text)
