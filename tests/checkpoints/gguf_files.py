"""GGUF files from Hugging Face's tensors, in the way of llama.cpp's converter."""

from __future__ import annotations

import gguf
import numpy as np

from treespec_jax.config import ModelConfig

K_KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_KINDS)
# Where the scales of a block of 256 are: float16, one or two.
_SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def metadata_of(config: ModelConfig) -> dict:
    """What the converter writes of a configuration."""
    c, rotary = config, config.rotary
    values = {
        "general.architecture": c.family,
        "general.type": "model",
        "block_count": c.num_layers,
        "context_length": c.max_positions,
        "embedding_length": c.embed_dim,
        "feed_forward_length": c.mlp_dim,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(rotary.theta),
        "attention.scale": c.attention_scale,
        "attn_logit_softcapping": c.attention_soft_cap,
        "final_logit_softcapping": c.logit_soft_cap,
        "attention.sliding_window": c.window,
    }
    if rotary.scaling in ("linear", "yarn"):
        values["rope.scaling.type"] = rotary.scaling
        values["rope.scaling.factor"] = float(rotary.factor)
    if rotary.scaling == "yarn":
        values["rope.scaling.original_context_length"] = rotary.original_max_positions
        values["rope.scaling.yarn_beta_fast"] = rotary.beta_fast
        values["rope.scaling.yarn_beta_slow"] = rotary.beta_slow
        values["rope.scaling.yarn_attn_factor"] = rotary.attention_factor
    if c.window is not None:
        local = [i in c.local_layers for i in range(c.num_layers)]
        values["attention.sliding_window_pattern"] = local
    if c.local_rotary is not None:
        values["rope.freq_base_swa"] = float(c.local_rotary.theta)
    for name in ("bos", "eos"):
        token = c.bos_id if name == "bos" else next(iter(c.eos_ids), None)
        values[f"tokenizer.ggml.{name}_token_id"] = token
    front = ("general.", "tokenizer.", "split.")
    return {
        key if key.startswith(front) else f"{c.family}.{key}": value
        for key, value in values.items()
        if value is not None
    }


def write(path, metadata, tensors, endianess=gguf.GGUFEndian.LITTLE):
    """A file of these values and of tensors (type, raw data) by GGUF's names.

    Values of None are left out.
    """
    architecture = metadata.get("general.architecture") or "llama"
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    writer.kv_data[0].pop("general.architecture", None)
    for key, value in metadata.items():
        if value is not None:
            _kind_of(value, writer)(key, value)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _kind_of(value, writer):
    if isinstance(value, bool):
        return writer.add_bool
    if isinstance(value, int):
        return writer.add_uint32
    if isinstance(value, float):
        return writer.add_float32
    return writer.add_string if isinstance(value, str) else writer.add_array


def convert(config: ModelConfig, tensors, kinds=("F32",), seed=0):
    """Tensors for `write`, and what a loader must make of them.

    Args:
      config: of the model; rotary factors of Llama 3 are written as a tensor.
      tensors: float32, by the names of Hugging Face.
      kinds: types that the matrices take by turns; all else is F32.
      seed: of K blocks, which are random, as Python has no code that makes them.

    Returns:
      (type, raw data) by GGUF's names, and float32 by those of Hugging Face.
    """
    rng = np.random.default_rng(seed)
    kind_of = gguf.MODEL_ARCH_NAMES
    (arch,) = (arch for arch, name in kind_of.items() if name == config.family)
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    raw, expected, matrices = {}, {}, 0
    for name, tensor in tensors.items():
        rows = _rows(config, name)
        order = np.arange(len(tensor)) if rows is None else rows
        stored = tensor[order]
        offset = config.unit_offset_norms and name.endswith("norm.weight")
        if offset:
            stored = stored + np.float32(1)
        kind = "F32"
        if tensor.ndim > 1:
            kind = kinds[matrices % len(kinds)]
            matrices += 1
        data, values = _quantise(stored, kind, rng)
        if offset:
            values = values - np.float32(1)
        expected[name] = np.empty_like(values)
        expected[name][order] = values
        raw[names.get_name(name, (".weight", ".bias"))] = kind, data
    if config.rotary.scaling == "llama3":
        raw["rope_freqs.weight"] = "F32", _llama3_factors(config)
    return raw, expected


def _rows(config: ModelConfig, name: str) -> np.ndarray | None:
    """Where the rows of Llama's queries and keys come from."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    count = next((n for key, n in heads.items() if key in name), None)
    if config.family != "llama" or count is None:
        return None
    rows = np.arange(count * config.head_dim)
    return rows.reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)


def _quantise(tensor: np.ndarray, kind: str, rng) -> tuple[np.ndarray, np.ndarray]:
    """Raw data, and the gguf package's reading of them."""
    quant = gguf.GGMLQuantizationType[kind]
    if kind in K_KINDS:
        raw = _random_blocks(tensor.shape, kind, float(tensor.std()), rng)
    else:
        raw = gguf.quantize(tensor, quant)
    values = gguf.dequantize(raw, quant)
    return raw, np.asarray(values, np.float32).reshape(tensor.shape)


def _random_blocks(shape, kind: str, spread: float, rng) -> np.ndarray:
    quant = gguf.GGMLQuantizationType[kind]
    per_block, width = gguf.GGML_QUANT_SIZES[quant]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // per_block, width), np.uint8)

    def scaled(scale) -> np.ndarray:
        for index, offset in enumerate(_SCALES[kind]):
            values = np.full((len(raw), 1), scale * (1 + index), np.float16)
            raw[:, offset : offset + 2] = values.view(np.uint8)
        return gguf.dequantize(raw.reshape(*shape[:-1], -1), quant)

    scaled(spread / scaled(1.0).std())
    return raw.reshape(*shape[:-1], -1)


def _llama3_factors(config: ModelConfig) -> np.ndarray:
    """By wavelength, as the converter reckons."""
    c, factors = config.rotary, []
    for pair in range(config.head_dim // 2):
        wavelength = 2 * np.pi * c.theta ** (2 * pair / config.head_dim)
        turns = c.original_max_positions / wavelength
        if turns > c.high_freq_factor:
            factors.append(1.0)
        elif turns < c.low_freq_factor:
            factors.append(c.factor)
        else:
            span = c.high_freq_factor - c.low_freq_factor
            smooth = (turns - c.low_freq_factor) / span
            factors.append(1 / ((1 - smooth) / c.factor + smooth))
    return np.array(factors, np.float32)


def sentencepiece_vocabulary(model, controls=()) -> dict:
    """What the converter writes of a sentencepiece model (`SentencePieceProcessor`).

    Args:
      model: the model.
      controls: texts of user-defined pieces that look like control tokens.
    """
    tokens, scores, types = [], [], []
    for token in range(model.vocab_size()):
        text, kind = model.id_to_piece(token), 1
        if model.is_unknown(token):
            kind = 2
        elif model.is_control(token) or text in controls:
            kind = 3
        elif model.is_byte(token):
            kind = 6
        elif model.is_unused(token):
            kind = 5
        tokens.append(text)
        scores.append(model.get_score(token))
        types.append(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
    }
