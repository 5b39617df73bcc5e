"""Drafters in the names and shapes of their publishers, and what they compute.

The functions follow the published descriptions in plain NumPy, row by row.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import pickle
import sys
import types
import zipfile

import ml_dtypes  # noqa: F401
import numpy as np

V, VD, D, WIDE, F, N, K, H = 60, 23, 16, 24, 20, 4, 2, 8
EPS, THETA = 1e-5, 500.0
IDS = np.sort(np.random.default_rng(1).permutation(V)[:VD])


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32) * 0.4


@dataclasses.dataclass(frozen=True)
class Eagle:
    """How a layer is written down and wired.

    Attributes:
      third: EAGLE-3 rather than 1 or 2.
      prefix: of the layer's tensors.
      embeds: it has an embedding of its own.
      reduced: it knows few of the tokens.
      norm: of the features: "", "all" or "each".
      before: the residual is the normed row.
      bias: of the first matrix.
      input_norm: EAGLE-1 with a norm before attention.
      qk_norm: of the heads of queries and keys.
    """

    third: bool = True
    prefix: str = "midlayer"
    embeds: bool = True
    reduced: bool = True
    norm: str = ""
    before: bool = False
    bias: bool = False
    input_norm: bool = False
    qk_norm: bool = False

    def tensors(self, seed=0):
        rng, p = np.random.default_rng(seed), self.prefix
        width = 2 * D if self.third else D
        vocab = VD if self.reduced else V
        made = {
            "fc.weight": normal(rng, D, 3 * WIDE if self.third else 2 * D),
            f"{p}.self_attn.q_proj.weight": normal(rng, N * H, width),
            f"{p}.self_attn.k_proj.weight": normal(rng, K * H, width),
            f"{p}.self_attn.v_proj.weight": normal(rng, K * H, width),
            f"{p}.self_attn.o_proj.weight": normal(rng, D, N * H),
            f"{p}.mlp.gate_proj.weight": normal(rng, F, D),
            f"{p}.mlp.up_proj.weight": normal(rng, F, D),
            f"{p}.mlp.down_proj.weight": normal(rng, D, F),
            f"{p}.post_attention_layernorm.weight": 1 + normal(rng, D),
        }
        if self.third:
            names = [f"{p}.hidden_norm", f"{p}.input_layernorm", "norm"]
            made |= {f"{name}.weight": 1 + normal(rng, D) for name in names}
            made["lm_head.weight"] = normal(rng, vocab, D)
        if self.third and self.reduced:
            made["d2t"] = IDS - np.arange(VD)
            made["t2d"] = np.isin(np.arange(V), IDS)
        if self.embeds:
            made["embed_tokens.weight"] = normal(rng, V, D)
        if self.norm == "all":
            made["input_norm.weight"] = 1 + normal(rng, 3 * WIDE)
        if self.norm == "each":
            for i in range(3):
                made[f"fc_norm.{i}.weight"] = 1 + normal(rng, WIDE)
        if self.bias:
            made["fc.bias"] = normal(rng, D)
        if self.input_norm:
            made[f"{p}.input_layernorm.weight"] = 1 + normal(rng, D)
        if self.qk_norm:
            for name in ("q_norm", "k_norm"):
                made[f"{p}.self_attn.{name}.weight"] = 1 + normal(rng, H)
        return made


def settings(**changes):
    """The layer's part of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": D,
        "intermediate_size": F,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "vocab_size": V,
    } | changes


def write(folder, tensors, config):
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rms(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def rotated(x_TNH, positions_T):
    frequency = THETA ** (-2 * np.arange(H // 2) / H)
    angle = np.asarray(positions_T)[:, None, None] * frequency
    a, b = x_TNH[..., : H // 2], x_TNH[..., H // 2 :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def fused(kind: Eagle, w, features):
    """Rows [T, D] of the target's features [T, WIDE] each."""
    if not kind.third:
        return features[0]
    if kind.norm == "each":
        features = [rms(f, w[f"fc_norm.{i}.weight"]) for i, f in enumerate(features)]
    x = np.concatenate(features, -1)
    if kind.norm == "all":
        x = rms(x, w["input_norm.weight"])
    return x @ w["fc.weight"].T


def eagle_pass(kind: Eagle, w, embedding, head, tokens, hidden, mask, past=()):
    """Logits, outputs and rows of a pass at positions of `past` and after.

    Args:
      tokens: T of them, at positions from 0.
      hidden: [T, D].
      mask: bool [T, T], what each row sees.
    """
    p = kind.prefix
    e = embedding[tokens]
    if kind.third:
        normed = rms(hidden, w[f"{p}.hidden_norm.weight"])
        x = np.concatenate([rms(e, w[f"{p}.input_layernorm.weight"]), normed], -1)
        residual = normed if kind.before else hidden
    else:
        residual = np.concatenate([e, hidden], -1) @ w["fc.weight"].T
        residual = residual + w.get("fc.bias", 0)
        norm = w.get(f"{p}.input_layernorm.weight")
        x = residual if norm is None else rms(residual, norm)
    T = len(tokens)
    q, k, v = (
        (x @ w[f"{p}.self_attn.{n}_proj.weight"].T).reshape(T, -1, H) for n in "qkv"
    )
    if kind.qk_norm:
        q = rms(q, w[f"{p}.self_attn.q_norm.weight"])
        k = rms(k, w[f"{p}.self_attn.k_norm.weight"])
    q, k = rotated(q, np.arange(T)), rotated(k, np.arange(T))
    k, v = np.repeat(k, N // K, 1), np.repeat(v, N // K, 1)
    scores = np.einsum("tnh,unh->ntu", q, k) / np.sqrt(H)
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("ntu,unh->tnh", weights, v).reshape(T, -1)
    x = residual + out @ w[f"{p}.self_attn.o_proj.weight"].T
    y = rms(x, w[f"{p}.post_attention_layernorm.weight"])
    y = silu(y @ w[f"{p}.mlp.gate_proj.weight"].T) * (
        y @ w[f"{p}.mlp.up_proj.weight"].T
    )
    x = x + y @ w[f"{p}.mlp.down_proj.weight"].T
    last = rms(x, w["norm.weight"]) if kind.third else x
    return last @ head.T, x


def medusa_tensors(heads=3, blocks=2, seed=0, dtype="float32"):
    rng, made = np.random.default_rng(seed), {}
    for i in range(heads):
        for j in range(blocks):
            made[f"{i}.{j}.linear.weight"] = normal(rng, WIDE, WIDE).astype(dtype)
            made[f"{i}.{j}.linear.bias"] = normal(rng, WIDE).astype(dtype)
        made[f"{i}.{blocks}.weight"] = normal(rng, V, WIDE).astype(dtype)
    return made


def medusa_logits(w, heads, blocks, rows):
    """[heads, T, V] of rows [T, WIDE]."""
    w = {name: value.astype(np.float32) for name, value in w.items()}
    found = []
    for i in range(heads):
        x = rows
        for j in range(blocks):
            y = x @ w[f"{i}.{j}.linear.weight"].T + w[f"{i}.{j}.linear.bias"]
            x = x + silu(y)
        found.append(x @ w[f"{i}.{blocks}.weight"].T)
    return np.stack(found)


_STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}


class Rebuilt:
    """A value that a pickle builds by calling `torch._utils._rebuild_tensor_v2`."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        function = sys.modules["torch._utils"]._rebuild_tensor_v2
        return function, self.arguments


def write_torch(path, tensors, extra=None, strides=None, monkeypatch=None):
    """A file as `torch.save` writes it, without torch.

    Args:
      tensors: by name.
      extra: further entries of the dictionary.
      strides: of all tensors of two axes; None: row by row.
      monkeypatch: puts modules called torch in place while pickling.
    """
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in _STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        raise AssertionError

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    torch._utils = utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    storages, buffer = [], io.BytesIO()

    class Storage:
        def __init__(self, array):
            self.array = array

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, Storage):
                return None
            storages.append(value.array)
            kind = getattr(torch, _STORAGES[value.array.dtype.name])
            key = str(len(storages) - 1)
            return "storage", kind, key, "cpu", value.array.size

    held = collections.OrderedDict()
    for name, array in tensors.items():
        row_by_row = tuple(s // array.itemsize for s in array.strides)
        used = strides if strides and array.ndim == 2 else row_by_row
        hooks = collections.OrderedDict()
        held[name] = Rebuilt(Storage(array), 0, array.shape, used, False, hooks)
    held._metadata = collections.OrderedDict({"": {"version": 1}})
    held.update(extra or {})
    Pickler(buffer, protocol=2).dump(held)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(storages):
            archive.writestr(f"archive/data/{i}", array.tobytes())
    monkeypatch.undo()
    return path
