"""Makes the golden folders: tiny random models of every family, and their logits.

Needs torch and transformers, which nothing else here does:

  python3.11 -m venv /tmp/golden
  /tmp/golden/bin/pip install torch transformers safetensors numpy
  /tmp/golden/bin/python tests/golden/make_golden.py [NAME ...]

Made with torch 2.13.0 and transformers 5.23.0. Each folder NAME holds config.json and
weights as transformers writes them (some respelled as older versions did), and
golden.npz, computed in float32 by the model that transformers reads back from there:

  tokens int32 [2, 32], logits float32 [2, 32, V]
  branch int32 [2, 3], branch_logits float32 [2, 3, V]: other tokens for the last three
    places, and the logits of those

so that a tree may hold both ends.
"""

import dataclasses
import json
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

ROWS, BRANCH = 32, 3
# Shorter than ROWS, so that scaled angles are used past the original length.
ORIGINAL = 16
COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.25,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)
WIDE = dict(
    vocab_size=112, hidden_size=64, intermediate_size=64, initializer_range=0.15
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One folder.

    Attributes:
      family: names the configuration class and the model class.
      config: changes of COMMON.
      older: keys of config.json to change to an older spelling; None removes one.
      dtype: of the stored weights.
      shards: whether to write several files and an index.
    """

    family: str
    config: dict
    older: dict = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    shards: bool = False


def rotary(kind, theta=10000.0, **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **more))


def yarn(factor=4.0, **more):
    # A base and turns that let both ends of the blend fall inside a tiny head.
    return rotary(
        "yarn",
        theta=500.0,
        factor=factor,
        original_max_position_embeddings=ORIGINAL,
        beta_fast=1.0,
        beta_slow=0.25,
        **more,
    )


GEMMA = dict(head_dim=8, tie_word_embeddings=True, bos_token_id=2, eos_token_id=1)
GEMMA3 = dict(
    GEMMA,
    num_hidden_layers=4,
    num_key_value_heads=1,
    query_pre_attn_scalar=12,
    sliding_window=7,
    eos_token_id=[1, 5],
)
VARIANTS = {
    "llama_grouped": Variant("Llama", WIDE, dtype="float32"),
    "llama_tied": Variant(
        "Llama",
        dict(
            WIDE,
            num_key_value_heads=4,
            head_dim=8,
            tie_word_embeddings=True,
            hidden_size=48,
        ),
        dtype="float32",
    ),
    "llama3": Variant(
        "Llama",
        dict(
            rotary(
                "llama3",
                theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=ORIGINAL,
            ),
            num_key_value_heads=1,
            head_dim=16,
            rms_norm_eps=1e-6,
            eos_token_id=[2, 5],
        ),
    ),
    "llama_linear": Variant(
        "Llama",
        dict(rotary("linear", theta=5000.0, factor=2.5), head_dim=16),
        older=dict(
            rope_parameters=None,
            rope_theta=5000.0,
            rope_scaling=dict(type="linear", factor=2.5),
        ),
    ),
    "llama_yarn": Variant(
        "Llama",
        dict(
            yarn(mscale=0.8, mscale_all_dim=0.5, truncate=False),
            head_dim=16,
        ),
    ),
    "smollm": Variant(
        "Llama", dict(num_hidden_layers=3, tie_word_embeddings=True), shards=True
    ),
    "qwen2": Variant(
        "Qwen2",
        dict(yarn(), hidden_size=40, num_attention_heads=4),
        older=dict(
            rope_parameters=None,
            rope_theta=500.0,
            rope_scaling=dict(
                type="yarn",
                factor=4.0,
                original_max_position_embeddings=ORIGINAL,
                beta_fast=1.0,
                beta_slow=0.25,
            ),
        ),
    ),
    "qwen2_window": Variant(
        "Qwen2",
        dict(
            num_hidden_layers=3,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=1,
        ),
    ),
    "qwen3": Variant(
        "Qwen3",
        dict(yarn(attention_factor=1.3), head_dim=16, tie_word_embeddings=True),
    ),
    "mistral": Variant(
        "Mistral",
        dict(head_dim=12, sliding_window=7, num_key_value_heads=1),
        dtype="float16",
    ),
    "gemma": Variant(
        "Gemma",
        dict(GEMMA, num_key_value_heads=1, hidden_act="gelu_pytorch_tanh"),
        older=dict(hidden_act="gelu", rope_parameters=None, rope_theta=10000.0),
    ),
    "gemma2": Variant(
        "Gemma2",
        dict(
            GEMMA,
            num_hidden_layers=3,
            query_pre_attn_scalar=12,
            sliding_window=6,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=4.0,
        ),
        older=dict(layer_types=None, rope_parameters=None, rope_theta=10000.0),
    ),
    "gemma3_text": Variant(
        "Gemma3Text",
        dict(
            GEMMA3,
            layer_types=["sliding_attention"] * 2
            + ["full_attention", "sliding_attention"],
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
                full_attention=dict(rope_type="linear", factor=4.0, rope_theta=5e4),
            ),
        ),
        older=dict(
            rope_parameters=None,
            rope_theta=5e4,
            rope_local_base_freq=100.0,
            rope_scaling=dict(rope_type="linear", factor=4.0),
            layer_types=None,
            sliding_window_pattern=3,
        ),
    ),
    "gemma3_multimodal": Variant(
        "Gemma3",
        dict(
            text_config=dict(
                {**COMMON, **GEMMA3},
                layer_types=["sliding_attention", "full_attention"] * 2,
                rope_parameters=dict(
                    sliding_attention=dict(rope_type="default", rope_theta=100.0),
                    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=5e4),
                ),
            ),
            vision_config=dict(
                model_type="siglip_vision_model",
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
                num_channels=1,
            ),
            mm_tokens_per_image=4,
            boi_token_index=90,
            eoi_token_index=91,
            image_token_index=92,
            tie_word_embeddings=True,
            eos_token_id=[1, 5],
        ),
    ),
}


def classes(family):
    ends = {
        "Gemma3Text": "Gemma3ForCausalLM",
        "Gemma3": "Gemma3ForConditionalGeneration",
    }
    model = ends.get(family, f"{family}ForCausalLM")
    return getattr(transformers, f"{family}Config"), getattr(transformers, model)


def randomise(model):
    """Norms start as ones (or zeros) and biases as zeros: either hides a mistake."""
    for path, parameter in model.named_parameters():
        if "norm" in path:
            # Gemma scales by 1 + w.
            start = 0.0 if "Gemma" in type(model).__name__ else 1.0
            parameter.uniform_(start - 0.5, start + 0.5)
        elif path.endswith("bias"):
            parameter.normal_(0, 0.5)


def respell(path, changes):
    values = json.loads(path.read_text())
    values.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del values[key]
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def make(folder, variant, seed):
    torch.manual_seed(seed)
    config_class, model_class = classes(variant.family)
    nested = "text_config" in variant.config
    config = config_class(**(variant.config if nested else COMMON | variant.config))
    made = model_class(config)
    randomise(made)
    made.to(getattr(torch, variant.dtype))
    shutil.rmtree(folder, ignore_errors=True)
    made.save_pretrained(folder, max_shard_size="24KB" if variant.shards else "5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    respell(folder / "config.json", variant.older)
    model = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    vocab = config.get_text_config().vocab_size
    # Images are marked by tokens near the end of the vocabulary.
    tokens = torch.randint(0, vocab - 8, (2, ROWS))
    branch = (tokens[:, -BRANCH:] + torch.randint(1, vocab - 8, (2, BRANCH))) % (
        vocab - 8
    )
    other = torch.cat([tokens[:, :-BRANCH], branch], 1)
    logits, others = model(tokens).logits, model(other).logits
    np.savez_compressed(
        folder / "golden.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        branch=branch.numpy().astype(np.int32),
        branch_logits=others[:, -BRANCH:].numpy(),
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    largest = logits.abs().max()
    print(f"{folder.name:20} {size / 1000:6.1f} kB, largest logit {largest:.2f}")


def main():
    root = pathlib.Path(__file__).parent
    wanted = sys.argv[1:] or VARIANTS
    for seed, (name, variant) in enumerate(VARIANTS.items()):
        if name in wanted:
            make(root / name, variant, seed)


if __name__ == "__main__":
    main()
