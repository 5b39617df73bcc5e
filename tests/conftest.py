"""Shared tiny models. Fixtures are session-wide: compiling is what tests pay for."""

from __future__ import annotations

import collections
import dataclasses
import gc
import importlib.util
import os
import pathlib
import platform
import shutil

# Before jax starts: with libtpu installed it would look for a TPU first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM's optimisation is half of what compiling costs, and most programs of tests run
# too little to win it back. XLA's own passes still run. Processes that tests start
# inherit it; with "0" all is compiled as users have it, and so is what asks for
# `optimised_programs`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# No test writes to the user's cache; those that want one name a folder.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import hypothesis
import jax
import jax.monitoring
import numpy as np
import pytest
from flax import nnx

from treespec_jax import cost_file
from treespec_jax.config import ModelConfig
from treespec_jax.models.transformer import Transformer

jax.config.update("jax_numpy_rank_promotion", "allow")
jax.config.update("jax_debug_key_reuse", False)

# The same examples in every run, so that a change is judged by itself; others are tried
# with HYPOTHESIS_PROFILE=explore.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

TINY = ModelConfig(
    vocab_size=97,
    embed_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=256,
)

MAPS = pathlib.Path("/proc/self/maps")

# For tests marked so; None: they are left out, and the end of the run says why.
BROWSER = next(
    filter(
        None,
        map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")),
    ),
    None,
)


# XLA's older generator of code for fused loops: half of the time that is left. The
# operations, what is fused and the tokens are the same, roundings are not always.
QUICK_CODE = "--xla_cpu_use_fusion_emitters=false"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "optimised_programs" in item.fixturenames:
            item.add_marker("optimised")
    # Files of many slow tests first, so that no worker begins one when others are done.
    slow = collections.Counter(
        item.path for item in items if item.get_closest_marker("slow")
    )
    items.sort(key=lambda item: -slow[item.path])
    if BROWSER is None:
        absent = [item for item in items if item.get_closest_marker("browser")]
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


def pytest_collection_finish(session):
    """Before anything is compiled: a process keeps the flags that it compiles with.

    One test marked `optimised` gives all of them users' code: `make test` parts them.
    """
    quick = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    if quick and not any(i.get_closest_marker("optimised") for i in session.items):
        before = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{before} {QUICK_CODE}".strip()


def pytest_terminal_summary(terminalreporter):
    if BROWSER is None:
        reason = "no Chromium or Chrome is on PATH"
        terminalreporter.write_line(f"tests marked browser were left out: {reason}")


@pytest.fixture(scope="session")
def tiny_target() -> Transformer:
    """A random target with logits spread enough to be far from ties."""
    model = Transformer(TINY, rngs=nnx.Rngs(0))
    model.norm.scale[...] = model.norm.scale[...] * 3.0
    return model


@pytest.fixture(scope="session")
def tiny_draft(tiny_target) -> Transformer:
    """The target's first layer between its embedding and head: right now and then."""
    model = Transformer(dataclasses.replace(TINY, num_layers=1), rngs=nnx.Rngs(1))
    model.embedding[...] = tiny_target.embedding[...]
    model.head[...] = tiny_target.head[...]
    model.norm.scale[...] = tiny_target.norm.scale[...]
    nnx.update(model.layers[0], nnx.state(tiny_target.layers[0]))
    return model


@pytest.fixture(scope="session")
def ragged_prompts() -> list[list[int]]:
    """Five prompts from one token to several chunks and pages long."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, 97, n).tolist() for n in (1, 5, 17, 40, 3)]


@pytest.fixture
def stages():
    """Names and seconds of all stages of compiling that jax reports in a test."""
    found = []

    def listen(event, seconds, **_):
        if event.startswith("/jax/core/compile/"):
            found.append((event, seconds))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module", autouse=True)
def collected_garbage():
    """What outlives a module is looked through once, not by every later collection."""
    yield
    # Programs lie in maps of memory, of which Linux allows 65,530.
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def costs_folder(tmp_path_factory):
    """Where engines keep what steps cost, rather than in the user's cache."""
    folder = tmp_path_factory.mktemp("costs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_file, "cache_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def optimised_programs():
    """What a module compiles from here on is compiled as users have it."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="module")
def tpu_compiler(optimised_programs):
    """Skips where libtpu cannot be; fails, by use, where it is there but broken."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("libtpu exists for Linux on x86-64 only")
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; the test extra brings it")
    from pallas_kernels import aot

    aot.prepare()
    return aot
