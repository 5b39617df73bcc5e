"""Lists well-known models, or describes checkpoints: sizes before anything is loaded.

For example:

  list_models
  list_models --model=llama-3.1-8b,path/to/folder --dtype=float32 --json
"""

from __future__ import annotations

import json
from typing import Any

from absl.flags import DEFINE_bool, DEFINE_enum, DEFINE_list

from treespec_jax.checkpoints.catalogue import Model

_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def define() -> None:
    DEFINE_list(
        "model",
        None,
        "names, or checkpoints as --target takes them; default: all",
    )
    DEFINE_enum(
        "dtype", "bfloat16", list(_DTYPES), "of the parameters and of the cache"
    )
    DEFINE_bool("json", False, "print JSON, in parameters, bytes and tokens")


def main(given) -> None:
    from treespec_jax.checkpoints.catalogue import CATALOGUE
    from treespec_jax.measurement.tables import aligned
    from treespec_jax.models import presets

    dtype, names = given.dtype, given.model or presets.names()
    models = [describe(name, _DTYPES[dtype]) for name in names]
    catalogue = [] if given.model else [_entry(model) for model in CATALOGUE.values()]
    if given.json:
        report = {"dtype": dtype, "models": models}
        if catalogue:
            report["catalogue"] = catalogue
        print(json.dumps(report, indent=2))
        return
    head = ["name", "family", "parameters", f"{dtype} GB", "cache kB", "tokens"]
    rows = [head]
    for name, family, parameters, weights, cache, positions in map(dict.values, models):
        row = [name, family, f"{parameters:,}", f"{weights / 1e9:.2f}"]
        rows.append([*row, f"{cache / 1e3:.1f}", f"{positions:,}"])
    print(aligned(rows))
    print("cache: per token of a text; tokens: the longest text the model knows")
    if catalogue:
        print("\nnames that --target takes, besides paths and org/name of the hub:")
        print(
            aligned([list(row) for row in (catalogue[0], *map(dict.values, catalogue))])
        )


def _entry(model: Model) -> dict[str, str]:
    where = "part of the package"
    if model.wheel is not None:
        here = model.path.exists()
        where = str(model.path) if here else f"treespec fetch_model {model.name}"
    drafter = model.draft or f"method {model.method}"
    return {
        "name": model.name,
        "drafter": drafter,
        "licence": model.licence,
        "where": where,
    }


def describe(name: str, size: int) -> dict[str, Any]:
    """Sizes of a model, or of the checkpoint of that path, in numbers of some bytes.

    Raises:
      UserError: no model of that name and no file, or an unreadable checkpoint.
    """
    from treespec_jax import checkpoints
    from treespec_jax.checkpoints import names
    from treespec_jax.checkpoints.families import parameter_count
    from treespec_jax.models import presets

    if names.known(name):
        config = checkpoints.describe(name).config
    else:
        config = presets.get(name)
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
