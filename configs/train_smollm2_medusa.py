"""SmolLM2-135M-Instruct's Medusa heads: four of one block each, 8,192 tokens.

The texts are those of train_smollm2_eagle3.py.

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
    config.optimizer.steps = 1161
    config.optimizer.warmup = 50
    config.optimizer.decay = 120
    config.optimizer.peak = 1e-3
    config.optimizer.floor = config.optimizer.weight_decay = 0.02
    config.run.eval_every = 150
    config.run.eval_rows = 64
    return config
