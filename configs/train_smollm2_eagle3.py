"""SmolLM2-135M-Instruct's EAGLE-3 layer: 6.0 million parameters, 8,192 tokens.

  python configs/data/smollm2_prompts.py --data=DATA --output=runs/prompts.jsonl
  python scripts/generate_answers.py --target=smollm2-135m-instruct --dtype=bfloat16 \\
      --dialogues=10240 --max_tokens=488 --max_batch=1024 --output=runs/dialogues
  python scripts/generate_answers.py --target=smollm2-135m-instruct --dtype=bfloat16 \\
      --prompts_file=runs/prompts.jsonl --limit=6376 --max_tokens=256 --max_batch=512 \\
      --seed=7 --output=runs/answers
  python scripts/train_drafter.py --config=configs/train_smollm2_eagle3.py \\
      --data=runs/dialogues --data=runs/answers --output=runs/smollm2-eagle3

Some ten minutes on one H200.
"""

from ml_collections import ConfigDict

from treespec_jax.commands.train_drafter_config import get_config as usual


def get_config() -> ConfigDict:
    config = usual()
    config.target = "smollm2-135m-instruct"
    config.data.row_tokens = 512
    config.data.batch_rows = config.data.micro_rows = 64
    config.data.held_out = 0.01
    config.drafter.vocab = 8192
    config.drafter.mlp_dim = 2048
    config.optimizer.steps = 2803
    config.optimizer.warmup = 80
    config.optimizer.decay = 150
    config.optimizer.peak = 1.5e-3
    config.optimizer.floor = config.optimizer.weight_decay = 0.02
    config.run.eval_every = 150
    config.run.eval_rows = 64
    return config
