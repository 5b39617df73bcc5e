"""The bundled target's Medusa heads: four of one block each.

The texts are those of train_bundled_eagle3.py.

  python scripts/train_drafter.py --config=configs/train_bundled_medusa.py \\
      --data=runs/stories --output=runs/medusa
"""

from ml_collections import ConfigDict

from treespec_jax.commands.train_drafter_config import get_config as usual


def get_config() -> ConfigDict:
    config = usual()
    config.method = "medusa"
    config.target = "tinystories-5m"
    config.data.batch_rows = config.data.micro_rows = 64
    config.drafter.heads = config.objective.predictions = 4
    config.optimizer.steps = 1500
    config.optimizer.warmup = 50
    config.optimizer.decay = 300
    config.optimizer.peak = 1e-3
    config.optimizer.floor = config.optimizer.weight_decay = 0.02
    config.run.eval_every = 250
    config.run.eval_rows = 64
    return config
