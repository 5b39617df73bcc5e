"""The configuration of `train_lm` without --config: a model that trains in a minute.

treespec train_lm --text=some.txt --output=runs/tiny
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from treespec_jax.training.settings import DistillConfig, OptimizerConfig


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            data=dict(
                # What --text names takes the place of `text`.
                sources=dict(text=dict(path="text.txt", weight=1.0)),
                row_tokens=128,
                batch_rows=8,
                micro_rows=8,
                held_out=0.05,
                seed=0,
            ),
            vocabulary=dict(path="", size=512),
            model=dict(
                embed_dim=64,
                mlp_dim=176,
                num_layers=2,
                num_heads=4,
                num_kv_heads=2,
                head_dim=16,
                max_positions=256,
                tied_embeddings=True,
            ),
            optimizer=asdict(OptimizerConfig(steps=300, peak=5e-3, warmup=30)),
            distill=asdict(DistillConfig()),
            run=dict(
                output="",
                save_minutes=1.0,
                eval_every=50,
                eval_rows=32,
                stop_after=0,
                progress=True,
                export_dtype="bfloat16",
                sample="once upon a time",
            ),
        )
    )
