"""The bundled target's EAGLE-3 layer: 1.1 million parameters, all 2,048 tokens.

  python scripts/generate_answers.py --target=tinystories-5m --dtype=bfloat16 \\
      --stories=12000 --max_tokens=220 --max_batch=512 --output=runs/stories
  python scripts/train_drafter.py --config=configs/train_bundled_eagle3.py \\
      --data=runs/stories --output=runs/eagle3
"""

from ml_collections import ConfigDict

from treespec_jax.commands.train_drafter_config import get_config as usual


def get_config() -> ConfigDict:
    config = usual()
    config.target = "tinystories-5m"
    config.data.batch_rows = config.data.micro_rows = 64
    config.drafter.feature_layers = (1, 3, 5)
    config.optimizer.steps = 2500
    config.optimizer.warmup = 80
    config.optimizer.decay = 400
    config.optimizer.peak = 2e-3
    config.optimizer.floor = config.optimizer.weight_decay = 0.02
    config.run.eval_every = 250
    config.run.eval_rows = 64
    return config
