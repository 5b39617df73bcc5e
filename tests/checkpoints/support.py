"""Runs of a loaded model, compiled; and small tokenizers."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from treespec_jax.checkpoints.tokenizers import TextStream
from treespec_jax.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=300,
    embed_dim=16,
    mlp_dim=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
    eos_ids=(2, 7),
)

SENTENCES = [
    "once upon a time there was a little girl named lily",
    "the cat sat on the mat and looked at the dog",
    "one day tom went to the park with his mother",
    "they liked to play with the red ball all day long",
] * 4


def forward(model, tokens_BT, start=0, view=None, depths=None, mask=None):
    """Logits [B, T, V] of rows behind `start` rows of prefix; their keys and values.

    The rows are a chain, or a tree: depths [T], and mask [T, T] of what each row sees.
    """
    B, T = np.shape(tokens_BT)
    depths = np.arange(T) if depths is None else depths
    mask = np.tril(np.ones((T, T), bool)) if mask is None else mask
    graph, state = nnx.split(model)
    return _forward(
        graph,
        state,
        jnp.asarray(tokens_BT, jnp.int32),
        jnp.broadcast_to(jnp.asarray(start + np.asarray(depths), jnp.int32), (B, T)),
        jnp.broadcast_to(jnp.asarray(mask), (B, T, T)),
        view,
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph, state, tokens_BT, positions_BT, mask_BTU, view):
    B, T = tokens_BT.shape
    model = nnx.merge(graph, state)
    done = model(tokens_BT, positions_BT, mask_BTU, view)
    return model.logits(done.hidden).reshape(B, T, -1), done.kv


def greedy(model, ids, count):
    """Appends `count` likeliest tokens. One shape, as a chain never looks ahead."""
    row = np.zeros((1, len(ids) + count), np.int32)
    row[0, : len(ids)] = ids
    for position in range(len(ids), row.shape[1]):
        logits, _ = forward(model, row)
        row[0, position] = int(np.argmax(logits[0, position - 1]))
    return row[0].tolist()


def same_parameters(first, second) -> bool:
    """Whether two models hold equal values of equal dtypes under equal names."""
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(m))) for m in (first, second))
    return ours.keys() == theirs.keys() and all(
        a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
        for path in ours
        for a, b in zip(*map(jax.tree.leaves, (ours[path], theirs[path])), strict=True)
    )


def tensors_of(model, pieces):
    """The parameters of a model, cut into the tensors of a name table."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}
    tensors = {}
    for piece in pieces:
        part = arrays[piece.path][piece.index]
        if piece.interleaved:
            *lead, rows, width = part.shape
            halves = part.reshape(*lead, 2, rows // 2, width)
            part = halves.swapaxes(-3, -2)
        tensors[piece.name] = np.ascontiguousarray(part.reshape(piece.shape))
    return tensors


def write_huggingface(folder, config, tensors):
    """A folder of the Llama family with these tensors; made unless it is there."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "eos_token_id": list(config.eos_ids),
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


# Characters of one to four bytes, joined and combining ones among them.
CHARACTERS = "a e\u0301 é你好한😀\u200d👩🏽\u0300\u3000\n\t𒀱"


def check_stream(reader, text, share):
    """A stream of the tokens behind a prompt that ends anywhere, in a character too."""
    ids = reader.encode(text)
    whole = reader.decode(ids)
    assert "\ufffd" not in whole
    cut = round(share * len(ids))
    before = TextStream(reader).push(ids[:cut])
    stream = TextStream(reader, ids[:cut])
    pieces = [stream.push([token]) for token in ids[cut:]]
    assert before + "".join(pieces) == whole
    assert stream.flush() == ""


def train_sentencepiece(folder, name="tokenizer", **options):
    """A sentencepiece model of a few dozen pieces and the 256 bytes."""
    import sentencepiece

    settings = dict(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / name),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(**{**settings, **options})
    return folder / f"{name}.model"


def write_llama2c_tokenizer(path, pieces):
    """Writes (piece, score) pairs as llama2.c does, after control and byte tokens."""
    import struct

    front = ["<unk>", "\n<s>\n", "\n</s>\n"] + [f"<0x{b:02X}>" for b in range(256)]
    rows = [(text, 0.0) for text in front] + list(pieces)
    data = struct.pack("<i", max(len(text.encode()) for text, _ in rows))
    for text, score in rows:
        data += struct.pack("<fi", score, len(text.encode())) + text.encode()
    path.write_bytes(data)
    return path
