"""The bundled drafter: 0.6 million parameters, distilled from the bundled target.

  python scripts/train_lm.py --config=configs/train_bundled_draft.py \\
      --text=stories=tinystories.txt \\
      --teacher=runs/target/model --vocabulary=runs/target/model --output=runs/draft
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

_spec = importlib.util.spec_from_file_location(
    "train_bundled_target", pathlib.Path(__file__).with_name("train_bundled_target.py")
)
_target = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_target)


def get_config() -> ConfigDict:
    config = _target.get_config()
    config.model.embed_dim = 128
    config.model.mlp_dim = 352
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.optimizer.steps = 1200
    config.optimizer.peak = 3e-3
    config.optimizer.weight_decay = 0.01
    # Agreement with the target is the goal; the text itself teaches only noise.
    config.distill.weight = 1.0
    return config
