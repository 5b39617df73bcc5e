"""llama2.c files: against an independent forward pass in plain numpy."""

import pathlib
import struct

import numpy as np
import pytest

from tests.checkpoints.contract import FormatContract
from tests.checkpoints.support import (
    SMALL,
    forward,
    greedy,
    tensors_of,
    write_llama2c_tokenizer,
)
from treespec_jax.checkpoints import load
from treespec_jax.checkpoints.formats import llama2c
from treespec_jax.errors import UserError

SHARED = pathlib.Path(__file__).parents[2].parent / "shared" / "weights"
DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, POSITIONS = 24, 40, 2, 6, 2, 53, 32
WIDTH = DIM // HEADS


def random_weights(rng, separate_head):
    def draw(*shape):
        return rng.normal(size=shape, scale=0.25).astype(np.float32)

    kv = KV_HEADS * WIDTH
    weights = {
        "embedding": draw(VOCAB, DIM),
        "attention_norm": 1 + draw(LAYERS, DIM),
        "wq": draw(LAYERS, DIM, DIM),
        "wk": draw(LAYERS, kv, DIM),
        "wv": draw(LAYERS, kv, DIM),
        "wo": draw(LAYERS, DIM, DIM),
        "ffn_norm": 1 + draw(LAYERS, DIM),
        "w1": draw(LAYERS, HIDDEN, DIM),
        "w2": draw(LAYERS, DIM, HIDDEN),
        "w3": draw(LAYERS, HIDDEN, DIM),
        "norm": 1 + draw(DIM),
        # Two rotary tables that no reader may use.
        "rotary": np.full((2, POSITIONS, WIDTH // 2), np.nan, np.float32),
    }
    if separate_head:
        weights["head"] = draw(VOCAB, DIM)
    return weights


def write(path, weights, sizes=None):
    vocab = -VOCAB if "head" in weights else VOCAB
    sizes = sizes or (DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, vocab, POSITIONS)
    data = b"".join(w.astype("<f4").tobytes() for w in weights.values())
    path.write_bytes(struct.pack("<7i", *sizes) + data)
    return path


def reference(weights, tokens):
    """run.c's forward, token by token: interleaved rotary pairs, a plain cache."""

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x) + 1e-5) * scale

    def rotate(x, position):
        x = x.reshape(-1, WIDTH).copy()
        for i in range(0, WIDTH, 2):
            angle = position / 10000.0 ** (i / WIDTH)
            a, b = x[:, i].copy(), x[:, i + 1].copy()
            x[:, i] = a * np.cos(angle) - b * np.sin(angle)
            x[:, i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return x

    w = {name: value.astype(np.float64) for name, value in weights.items()}
    cache = [([], []) for _ in range(LAYERS)]
    logits = []
    for position, token in enumerate(tokens):
        x = w["embedding"][token]
        for i, (keys, values) in enumerate(cache):
            h = norm(x, w["attention_norm"][i])
            q = rotate(w["wq"][i] @ h, position)
            keys.append(rotate(w["wk"][i] @ h, position))
            values.append((w["wv"][i] @ h).reshape(KV_HEADS, WIDTH))
            heads = []
            for n in range(HEADS):
                k = n // (HEADS // KV_HEADS)
                scores = np.array([q[n] @ key[k] for key in keys]) / np.sqrt(WIDTH)
                chance = np.exp(scores - scores.max())
                chance /= chance.sum()
                heads.append(sum(c * v[k] for c, v in zip(chance, values, strict=True)))
            x = x + w["wo"][i] @ np.concatenate(heads)
            h = norm(x, w["ffn_norm"][i])
            gate = w["w1"][i] @ h
            x = x + w["w2"][i] @ (gate / (1 + np.exp(-gate)) * (w["w3"][i] @ h))
        logits.append(w.get("head", w["embedding"]) @ norm(x, w["norm"]))
    return np.stack(logits)


class TestContract(FormatContract):
    format = llama2c.Llama2cFormat

    @pytest.fixture
    def checkpoint(self, tmp_path, model, tokenizer):
        tensors = tensors_of(model, llama2c.name_table(SMALL))
        layers = ["attention_norm", "wq", "wk", "wv", "wo"]
        layers += ["mlp_norm", "w1", "w2", "w3"]
        weights = {
            "embedding": tensors["embedding"],
            **{k: np.stack([tensors[f"{k}.{i}"] for i in (0, 1)]) for k in layers},
            "norm": tensors["norm"],
            "rotary": np.full((2, SMALL.max_positions, SMALL.head_dim // 2), np.nan),
            "head": tensors["head"],
        }
        path = tmp_path / "folder" / "model.bin"
        path.parent.mkdir()
        tokenizer.save(path.parent)
        c = SMALL
        sizes = (c.embed_dim, c.mlp_dim, c.num_layers, c.num_heads, c.num_kv_heads)
        return write(path, weights, (*sizes, -c.vocab_size, c.max_positions))


@pytest.mark.parametrize("separate_head", [False, True])
def test_logits_equal_the_original_program(tmp_path, separate_head):
    rng = np.random.default_rng(3)
    weights = random_weights(rng, separate_head)
    loaded = load(write(tmp_path / "model.bin", weights))
    assert loaded.config.tied_embeddings is not separate_head
    assert loaded.config.max_positions == POSITIONS
    assert loaded.tokenizer is None
    assert (loaded.source, loaded.dtype) == ("model.bin", np.float32)
    tokens = rng.integers(0, VOCAB, 12)
    found, _ = forward(loaded.model, tokens[None])
    np.testing.assert_allclose(found[0], reference(weights, tokens), atol=1e-4)


@pytest.fixture
def model_file(tmp_path):
    return write(tmp_path / "m.bin", random_weights(np.random.default_rng(0), False))


def test_tokenizer_with_more_pieces_than_embeddings(model_file, tmp_path):
    path = write_llama2c_tokenizer(tmp_path / "tok.bin", [("a", -1.0)])
    with pytest.raises(UserError, match="tok.bin has 260 pieces, the model .*53"):
        load(model_file)
    with pytest.raises(UserError, match="260 pieces"):
        load(model_file, tokenizer=path)


@pytest.mark.parametrize("cut", [-4, 4])
def test_file_of_the_wrong_size(model_file, cut):
    data = model_file.read_bytes()
    model_file.write_bytes(data[:cut] if cut < 0 else data + bytes(cut))
    with pytest.raises(UserError, match=f"m.bin has {len(data) + cut} bytes, its head"):
        load(model_file)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "m.bin"
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="too short"):
        load(path)
    path.write_bytes(struct.pack("<7i", 0x616B3432, 1, 0, 0, 0, 0, 0))
    with pytest.raises(UserError, match="of version 1; export it with --version 0"):
        load(path)
    path.write_bytes(struct.pack("<7i", 64, 172, 5, 7, 4, 512, 512))
    with pytest.raises(UserError, match="does not begin like a llama2.c checkpoint"):
        load(path)


def test_weights_that_are_not_finite(tmp_path):
    weights = random_weights(np.random.default_rng(0), False)
    weights["wk"][1, 2, 3] = np.inf
    with pytest.raises(UserError, match="tensor wk.1 holds NaN or infinity"):
        load(write(tmp_path / "m.bin", weights))


def test_weights_beyond_float16(tmp_path):
    weights = random_weights(np.random.default_rng(0), False)
    weights["w2"][0, 0, 0] = 1e6
    path = write(tmp_path / "m.bin", weights)
    with pytest.raises(UserError, match="tensor w2.0 holds values above float16's"):
        load(path, "float16")
    assert load(path, "bfloat16").dtype.name == "bfloat16"


@pytest.mark.skipif(not SHARED.is_dir(), reason="real checkpoints are not here")
def test_real_checkpoint_tells_its_story():
    loaded = load(SHARED / "stories260K.bin", tokenizer=SHARED / "tok512.bin")
    beside = load(SHARED / "stories260K.bin").tokenizer
    assert beside.source == str(SHARED / "tok512.bin")
    story = "Once upon a time, there was a little girl named Lily."
    count = len(loaded.tokenizer.encode(story)) - 1
    ids = greedy(loaded.model, loaded.tokenizer.encode(""), count)
    assert loaded.tokenizer.decode(ids) == story
