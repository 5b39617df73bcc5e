"""The configuration of `train_drafter` without --config: an EAGLE-3 layer.

treespec train_drafter --target=MODEL --data=runs/texts --output=runs/eagle
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from treespec_jax.training.drafter_settings import Objective, ShapeConfig
from treespec_jax.training.settings import OptimizerConfig


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            method="eagle3",
            target="",
            seed=0,
            data=dict(
                answers=(),
                text=(),
                separator="",
                row_tokens=256,
                batch_rows=16,
                micro_rows=4,
                held_out=0.02,
                seed=0,
            ),
            drafter=asdict(ShapeConfig()) | dict(feature_layers=()),
            objective=asdict(Objective()),
            optimizer=asdict(
                OptimizerConfig(steps=2000, peak=1e-3, warmup=100, decay=400)
            ),
            run=dict(
                output="",
                save_minutes=5.0,
                eval_every=100,
                eval_rows=32,
                stop_after=0,
                max_minutes=0.0,
                progress=True,
                export_dtype="bfloat16",
                dtype="",
            ),
        )
    )
