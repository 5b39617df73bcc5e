"""Makes tests/golden/configs.json: settings of published models, and their meaning.

    python tests/golden/make_configs.py     (torch, transformers)

Each entry holds `config.json` with the keys that its publisher writes, the ends of
`generation_config.json`, and what the model that transformers makes of them computes:
numbers are those of its modules (on torch's meta device, without weights).
"""

from __future__ import annotations

import json
import pathlib

import torch
import transformers

FILE = pathlib.Path(__file__).resolve().parent / "configs.json"
LOCAL = "sliding_attention"


def sizes(width, mlp, layers, heads, groups, vocab, positions, **more) -> dict:
    return dict(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocab,
        max_position_embeddings=positions,
        torch_dtype="bfloat16",
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
        **more,
    )


def llama(*args, **more) -> dict:
    return (
        sizes(*args)
        | dict(
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            hidden_act="silu",
            pretraining_tp=1,
            attention_bias=False,
            rms_norm_eps=1e-5,
            rope_scaling=None,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
        | more
    )


def mistral(*args, **more) -> dict:
    return (
        sizes(*args)
        | dict(
            architectures=["MistralForCausalLM"],
            model_type="mistral",
            hidden_act="silu",
            rms_norm_eps=1e-5,
            sliding_window=None,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
        | more
    )


def qwen(number, *args, **more) -> dict:
    return (
        sizes(*args)
        | dict(
            architectures=[f"Qwen{number}ForCausalLM"],
            model_type=f"qwen{number}",
            hidden_act="silu",
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            use_sliding_window=False,
            tie_word_embeddings=False,
            bos_token_id=151643,
            eos_token_id=151645,
        )
        | more
    )


def gemma(kind, *args, **more) -> dict:
    name = kind.removesuffix("_text").capitalize()
    return (
        sizes(*args)
        | dict(
            architectures=[f"{name}ForCausalLM"],
            model_type=kind,
            attention_bias=False,
            rms_norm_eps=1e-6,
            head_dim=256,
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
        )
        | more
    )


LLAMA3 = dict(
    rope_type="llama3",
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
TANH = "gelu_pytorch_tanh"
QWEN25 = (3584, 18944, 28, 28, 4, 152064)
QWEN3 = (2560, 9728, 36, 32, 8, 151936)
READ = {
    "Llama 3.2 3B Instruct": llama(
        *(3072, 8192, 28, 24, 8, 128256, 131072),
        head_dim=128,
        mlp_bias=False,
        rope_theta=500000.0,
        rope_scaling=dict(LLAMA3, factor=32.0),
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    ),
    "SmolLM2 1.7B": llama(
        *(2048, 8192, 24, 32, 32, 49152, 8192),
        rope_theta=130000,
        tie_word_embeddings=True,
        is_llama_config=True,
        rope_interleaved=False,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "Yi 6B": llama(
        *(4096, 11008, 32, 32, 4, 64000, 4096), rms_norm_eps=1e-6, rope_theta=5e6
    ),
    "TinyLlama 1.1B": llama(2048, 5632, 22, 32, 4, 32000, 2048),
    "DeepSeek Coder 6.7B": llama(
        *(4096, 11008, 32, 32, 32, 32256, 16384),
        rms_norm_eps=1e-6,
        rope_theta=100000,
        rope_scaling={"factor": 4.0, "type": "linear"},
        bos_token_id=32013,
        eos_token_id=32021,
    ),
    "Falcon3 7B": llama(
        *(3072, 23040, 28, 12, 4, 131072, 32768),
        head_dim=256,
        mlp_bias=False,
        rms_norm_eps=1e-6,
        rope_theta=1000042,
        bos_token_id=None,
        eos_token_id=11,
    ),
    "Mistral 7B v0.1": mistral(
        *(4096, 14336, 32, 32, 8, 32000, 32768), sliding_window=4096, rope_theta=1e4
    ),
    "Mistral 7B v0.3": mistral(*(4096, 14336, 32, 32, 8, 32768, 32768), rope_theta=1e6),
    "Mistral Nemo 12B": mistral(
        *(5120, 14336, 40, 32, 8, 131072, 131072), head_dim=128, rope_theta=1e6
    ),
    "Qwen2.5 7B Instruct": qwen(
        2, *QWEN25, 32768, max_window_layers=28, sliding_window=131072
    ),
    "Qwen2.5 7B Instruct, for long texts": qwen(
        *(2, *QWEN25, 32768),
        max_window_layers=28,
        sliding_window=131072,
        rope_scaling=dict(
            type="yarn", factor=4.0, original_max_position_embeddings=32768
        ),
    ),
    "DeepSeek R1 Distill Qwen 7B": qwen(
        *(2, *QWEN25, 131072),
        max_window_layers=28,
        sliding_window=4096,
        rope_theta=10000,
        use_mrope=False,
        eos_token_id=151643,
    ),
    "Qwen3 4B": qwen(
        *(3, *QWEN3, 40960),
        attention_bias=False,
        head_dim=128,
        max_window_layers=36,
        sliding_window=None,
        rope_scaling=None,
        tie_word_embeddings=True,
    ),
    "Qwen3 4B, as transformers 5 saves it": {
        key: value
        for key, value in qwen(
            *(3, *QWEN3, 262144),
            attention_bias=False,
            head_dim=128,
            dtype="bfloat16",
            layer_types=["full_attention"] * 36,
            max_window_layers=36,
            sliding_window=None,
            rope_parameters=dict(rope_theta=5e6, rope_type="default"),
            tie_word_embeddings=True,
        ).items()
        if key not in ("rope_theta", "torch_dtype")
    },
    "Gemma 7B": gemma(
        "gemma",
        *(3072, 24576, 28, 16, 16, 256000, 8192),
        hidden_act="gelu",
        rope_theta=10000.0,
        rope_scaling=None,
    ),
    "Gemma 2 9B": gemma(
        "gemma2",
        *(3584, 14336, 42, 16, 8, 256000, 8192),
        hidden_act=TANH,
        hidden_activation=TANH,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        sliding_window_size=4096,
        rope_theta=10000.0,
        cache_implementation="hybrid",
    ),
    "Gemma 2 27B": gemma(
        "gemma2",
        *(4608, 36864, 46, 32, 16, 256000, 8192),
        head_dim=128,
        hidden_act=TANH,
        hidden_activation=TANH,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=144,
        sliding_window=4096,
        rope_theta=10000.0,
    ),
    "Gemma 3 1B": gemma(
        "gemma3_text",
        *(1152, 6912, 26, 4, 1, 262144, 32768),
        hidden_activation=TANH,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        query_pre_attn_scalar=256,
        rope_theta=1000000,
        rope_local_base_freq=10000,
        rope_scaling=None,
        sliding_window=512,
        sliding_window_pattern=6,
        eos_token_id=[1, 106],
    ),
    "Gemma 3 4B": dict(
        architectures=["Gemma3ForConditionalGeneration"],
        model_type="gemma3",
        boi_token_index=255999,
        eoi_token_index=256000,
        image_token_index=262144,
        mm_tokens_per_image=256,
        eos_token_id=[1, 106],
        initializer_range=0.02,
        torch_dtype="bfloat16",
        text_config=dict(
            hidden_size=2560,
            intermediate_size=10240,
            model_type="gemma3_text",
            num_hidden_layers=34,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
            sliding_window=1024,
        ),
        vision_config=dict(
            hidden_size=1152,
            image_size=896,
            intermediate_size=4304,
            model_type="siglip_vision_model",
            num_attention_heads=16,
            num_hidden_layers=27,
            patch_size=14,
            vision_use_head=False,
        ),
    ),
}
ENDS = {"Qwen2.5 7B Instruct": [151645, 151643], "Gemma 2 9B": [1, 107]}


def other(architecture, kind, *args, **more) -> dict:
    return sizes(*args) | dict(architectures=[architecture], model_type=kind) | more


# Settings that this decoder does not have, with what is named as the reason.
REFUSED = {
    "Phi-3 mini": (
        other("Phi3ForCausalLM", "phi3", 3072, 8192, 32, 32, 32, 32064, 4096),
        "Phi3ForCausalLM",
    ),
    "Granite 3.3 2B": (
        other(
            *("GraniteForCausalLM", "granite", 2048, 8192, 40, 32, 8, 49159, 131072),
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
        ),
        "GraniteForCausalLM",
    ),
    "Qwen3 30B A3B": (
        other(
            *("Qwen3MoeForCausalLM", "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, 40960),
            num_experts=128,
            num_experts_per_tok=8,
        ),
        "Qwen3MoeForCausalLM",
    ),
    "Mixtral 8x7B": (
        other(
            *("MixtralForCausalLM", "mixtral", 4096, 14336, 32, 32, 8, 32000, 32768),
            num_local_experts=8,
        ),
        "MixtralForCausalLM",
    ),
    "Llama 4 Scout": (
        dict(
            architectures=["Llama4ForConditionalGeneration"],
            model_type="llama4",
            text_config=dict(model_type="llama4_text", num_local_experts=16),
            vision_config=dict(model_type="llama4_vision_model"),
        ),
        "Llama4ForConditionalGeneration",
    ),
    "SmolLM3 3B": (
        other(
            *("SmolLM3ForCausalLM", "smollm3", 2048, 11008, 36, 16, 4, 128256, 65536),
            no_rope_layers=[1, 1, 1, 0] * 9,
        ),
        "SmolLM3ForCausalLM",
    ),
    "Llama with biases": (
        llama(4096, 11008, 32, 32, 32, 32000, 4096, attention_bias=True),
        "attention_bias=true",
    ),
    "Llama with dynamic positions": (
        llama(
            *(4096, 11008, 32, 32, 32, 32000, 4096),
            rope_scaling={"type": "dynamic", "factor": 2.0},
        ),
        "dynamic",
    ),
    "Qwen2.5 VL 7B": (
        qwen(
            *(2, *QWEN25, 128000),
            architectures=["Qwen2_5_VLForConditionalGeneration"],
            model_type="qwen2_5_vl",
            rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        ),
        "Qwen2_5_VLForConditionalGeneration",
    ),
}


def listed(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def speeds(rotary, prefix: str) -> dict:
    values = getattr(rotary, f"{prefix}inv_freq").double()
    return {
        "speeds": [float(f"{value:.7g}") for value in values],
        "factor": getattr(rotary, f"{prefix}attention_scaling"),
    }


def meaning(config: transformers.PretrainedConfig) -> dict:
    """What the modules of a model say, layer by layer where layers may differ."""
    text = config.get_text_config()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(text)
    attentions = [layer.self_attn for layer in model.model.layers]
    rotary = type(model.model.rotary_emb)(text)
    norm = model.model.norm
    first = attentions[0]
    windows = [getattr(a, "sliding_window", None) for a in attentions]
    if text.model_type == "mistral":
        windows = [text.sliding_window] * len(attentions)
    separate = hasattr(rotary, f"{LOCAL}_inv_freq")
    cap = getattr(first, "attn_logit_softcapping", None)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "head_dim": first.head_dim,
        "attention_scale": first.scaling,
        "attention_soft_cap": cap,
        "logit_soft_cap": getattr(text, "final_logit_softcapping", None),
        "qkv_bias": first.q_proj.bias is not None,
        "qk_norm": hasattr(first, "q_norm"),
        "norm_eps": getattr(norm, "variance_epsilon", getattr(norm, "eps", None)),
        "tied_embeddings": model.lm_head.weight is model.model.embed_tokens.weight,
        "max_positions": text.max_position_embeddings,
        "window": next((w for w in windows if w), None),
        "local_layers": [i for i, window in enumerate(windows) if window],
        "rotary": speeds(rotary, "full_attention_" if separate else ""),
        "local_rotary": speeds(rotary, f"{LOCAL}_") if separate else None,
        "begin": text.bos_token_id,
        "ends": listed(config.eos_token_id) or listed(text.eos_token_id),
    }


def main() -> None:
    read = {}
    for name, settings in READ.items():
        values = {k: v for k, v in settings.items() if k != "architectures"}
        config = transformers.AutoConfig.for_model(**values)
        ends = ENDS.get(name)
        read[name] = {"config": settings, "ends": ends, "meaning": meaning(config)}
        print(name, {k: v for k, v in read[name]["meaning"].items() if k != "rotary"})
    refused = {
        name: {"config": settings, "reason": reason}
        for name, (settings, reason) in REFUSED.items()
    }
    found = {"read": read, "refused": refused}
    FILE.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
