"""The bundled target: 5 million parameters on children's stories.

  python scripts/train_lm.py --config=configs/train_bundled_target.py \\
      --text=stories=tinystories.txt --output=runs/target
"""

from ml_collections import ConfigDict

# UTF-8 that was once read as Windows-1252, and stray spaces.
_MEND = (
    ("â€œ", '"'),
    ("â€[™˜]", "'"),
    ("â€[“”]", "-"),
    ("â€¦", "..."),
    ("â€", '"'),
    ("[“”]", '"'),
    (" +\n", "\n"),
    ("\n{3,}", "\n\n"),
)


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            data=dict(
                sources=dict(
                    stories=dict(
                        path="tinystories.txt",
                        replace=_MEND,
                        # Paragraphs have an empty line between them, stories not.
                        separator=r"(?<!\n)\n(?!\n)",
                        # Single lines of speech, torn from their story.
                        min_chars=300,
                    )
                ),
                row_tokens=256,
                batch_rows=8,
                micro_rows=4,
                held_out=0.02,
                seed=0,
            ),
            vocabulary=dict(path="", size=2048),
            model=dict(
                embed_dim=256,
                mlp_dim=704,
                num_layers=6,
                num_heads=8,
                num_kv_heads=4,
                head_dim=32,
                max_positions=512,
                tied_embeddings=True,
            ),
            optimizer=dict(
                steps=1600,
                peak=2e-3,
                warmup=150,
                decay=0,
                floor=0.05,
                weight_decay=0.1,
                clip=1.0,
                beta2=0.98,
            ),
            distill=dict(teacher="", weight=0.8),
            run=dict(
                output="",
                save_minutes=5.0,
                eval_every=100,
                eval_rows=64,
                stop_after=0,
                progress=True,
                export_dtype="bfloat16",
                sample="once upon a time",
            ),
        )
    )
