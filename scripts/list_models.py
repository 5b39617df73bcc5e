"""Lists well-known models, or describes checkpoints: sizes before anything is loaded.

list_models.py
list_models.py --model=llama-3.1-8b,path/to/folder --dtype=float32 --json
"""

import json
from pathlib import Path

from absl import flags

from treespec_jax import cli

_MODEL = flags.DEFINE_list(
    "model", None, "names of models, or paths of checkpoints; default: all names"
)
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", list(_DTYPES), "of the parameters and of the cache"
)
_JSON = flags.DEFINE_bool("json", False, "print JSON, in parameters, bytes and tokens")


def describe(name: str, size: int) -> dict:
    from treespec_jax import checkpoints
    from treespec_jax.checkpoints.families import parameter_count
    from treespec_jax.models import presets

    path = Path(name).expanduser()
    config = checkpoints.describe(path).config if path.exists() else presets.get(name)
    parameters = parameter_count(config)
    rows = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    return {
        "name": name,
        "family": config.family,
        "parameters": parameters,
        "weight_bytes": parameters * size,
        "cache_bytes_per_token": rows * size,
        "positions": config.max_positions,
    }


def main(_) -> None:
    from treespec_jax.experiments.table import aligned
    from treespec_jax.models import presets

    size = _DTYPES[_DTYPE.value]
    models = [describe(name, size) for name in _MODEL.value or presets.names()]
    if _JSON.value:
        print(json.dumps({"dtype": _DTYPE.value, "models": models}, indent=2))
        return
    head = ["name", "family", "parameters", f"{_DTYPE.value} GB", "cache kB", "tokens"]
    rows = [
        [
            model["name"],
            model["family"],
            f"{model['parameters']:,}",
            f"{model['weight_bytes'] / 1e9:.2f}",
            f"{model['cache_bytes_per_token'] / 1e3:.1f}",
            f"{model['positions']:,}",
        ]
        for model in models
    ]
    print(aligned([head, *rows]))
    print("cache: per token of a text; tokens: the longest text the model knows")


if __name__ == "__main__":
    cli.run(main)
