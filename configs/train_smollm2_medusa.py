"""SmolLM2-135M-Instruct's Medusa heads: four of two blocks each, 8,192 tokens.

They also read the token that they go on from. The prompts of the answers are those of
train_smollm2_eagle3.py.

  python scripts/generate_answers.py --target=smollm2-135m-instruct --dtype=bfloat16 \\
      --dialogues=6144 --max_tokens=488 --max_batch=1024 --output=runs/dialogues
  python scripts/generate_answers.py --target=smollm2-135m-instruct --dtype=bfloat16 \\
      --prompts_file=runs/prompts.jsonl --temperatures=0 --max_tokens=256 \\
      --max_batch=1024 --output=runs/answers
  python scripts/train_drafter.py --config=configs/train_smollm2_medusa.py \\
      --data=runs/dialogues --data=runs/answers --output=runs/smollm2-medusa
"""

from ml_collections import ConfigDict

from treespec_jax.commands.train_drafter_config import get_config as usual


def get_config() -> ConfigDict:
    config = usual()
    config.method = "medusa"
    config.target = "smollm2-135m-instruct"
    config.data.row_tokens = 512
    config.data.batch_rows = config.data.micro_rows = 32
    config.data.held_out = 0.01
    config.drafter.vocab = 8192
    config.drafter.heads = config.objective.predictions = 4
    config.drafter.blocks = 2
    config.drafter.reads_root = True
    config.optimizer.steps = 1600
    config.optimizer.warmup = 50
    config.optimizer.decay = 150
    config.optimizer.peak = 1e-3
    config.optimizer.floor = config.optimizer.weight_decay = 0.02
    config.run.eval_every = 150
    config.run.eval_rows = 64
    return config
