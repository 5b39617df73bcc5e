"""A synthetic language and a model that learns it in seconds."""

from __future__ import annotations

import random

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from treespec_jax.training import settings

_NAMES = ["anna", "ben", "cleo", "dora"]
_THINGS = ["apple", "boat", "cat", "drum"]


@pytest.fixture(scope="package", autouse=True)
def shared_compilations(tmp_path_factory):
    """Every run compiles the same step; the first one pays for all."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def text() -> str:
    """Two-line tales, each about one name and one thing."""
    rng = random.Random(0)
    tales = []
    for _ in range(400):
        name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
        tales.append(f"{name} has a {thing}.\n{name} likes the {thing} very much.")
    return "\n\n".join(tales)


@pytest.fixture(scope="session")
def text_path(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tales.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def values(text_path, tmp_path):
    """A configuration of a tiny run, as nested dicts."""
    source = {"path": str(text_path), "separator": "\n\n"}
    return {
        "data": {
            "sources": {"tales": source},
            "row_tokens": 32,
            "batch_rows": 4,
            "micro_rows": 2,
            "held_out": 0.1,
        },
        "vocabulary": {"size": 320},
        "model": {
            "embed_dim": 32,
            "mlp_dim": 48,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 16,
            "max_positions": 64,
            "tied_embeddings": True,
        },
        "optimizer": {"steps": 12, "peak": 1e-2, "warmup": 2},
        "run": {
            "output": str(tmp_path / "run"),
            "eval_every": 4,
            "progress": False,
            "save_minutes": 0.0,
            "export_dtype": "float32",
            "sample": "anna",
        },
    }


@pytest.fixture
def build():
    return settings.build
