"""Makes the golden Llama folders: tiny random models and the logits they give.

Needs torch and transformers, which nothing else here does:

  python3.11 -m venv /tmp/golden
  /tmp/golden/bin/pip install torch transformers safetensors numpy
  /tmp/golden/bin/python tests/golden/make_llama.py

Made with torch 2.13.0 and transformers 5.23.0. Each folder NAME holds config.json and
model.safetensors as transformers writes them, and golden.npz: tokens int32 [2, 40] and
logits float32 [2, 40, V].
"""

import pathlib

import numpy as np
import torch
import transformers

COMMON = dict(
    vocab_size=112,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    initializer_range=0.15,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)
VARIANTS = {
    "llama_grouped": dict(num_key_value_heads=2, rms_norm_eps=1e-5),
    "llama_tied": dict(
        num_key_value_heads=4, head_dim=8, tie_word_embeddings=True, hidden_size=48
    ),
    "llama_theta": dict(
        num_key_value_heads=1,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        eos_token_id=[2, 5],
    ),
}


def main():
    root = pathlib.Path(__file__).parent
    for seed, (name, changes) in enumerate(VARIANTS.items()):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**{**COMMON, **changes})
        model = transformers.LlamaForCausalLM(config).float().eval()
        with torch.no_grad():
            # Norms start as ones, which would hide a norm in the wrong place.
            for path, parameter in model.named_parameters():
                if "norm" in path:
                    parameter.uniform_(0.5, 1.5)
            tokens = torch.randint(0, config.vocab_size, (2, 40))
            logits = model(tokens).logits
        model.save_pretrained(root / name)
        (root / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(
            root / name / "golden.npz",
            tokens=tokens.numpy().astype(np.int32),
            logits=logits.numpy(),
        )
        print(name, f"largest logit {logits.abs().max():.2f}")


if __name__ == "__main__":
    main()
