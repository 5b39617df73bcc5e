"""What a rule costs beside the verification that it judges."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from treespec_jax.acceptance import facts, rules, streams
from treespec_jax.acceptance.policy import Sampling
from treespec_jax.config import EngineConfig, ModelConfig, SpeculativeConfig
from treespec_jax.drafting import growth
from treespec_jax.drafting.protocol import DraftContext
from treespec_jax.experiments import costs, table
from treespec_jax.models.transformer import Transformer
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import StaticShape

# Llama-3.2-1B. Two stacks that differ in one layer give the time of a layer, and of the
# head with all that does not repeat; 16 layers are extrapolated from these.
LAYERS = 16
_TARGET = ModelConfig(
    vocab_size=128256,
    embed_dim=2048,
    mlp_dim=8192,
    num_layers=1,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_positions=2048,
    tied_embeddings=True,
)
_PREFIX = 512


@dataclasses.dataclass(frozen=True)
class Case:
    """A rule on a shape."""

    rule: str
    tree: str


CASES = (
    Case("exact", "regular:3x4x4"),
    Case("exact", "chain:63"),
    Case("token", "regular:3x4x4"),
    Case("token", "regular:7x2x1x1x1"),
    Case("token", "chain:63"),
    Case("block", "chain:63"),
    Case("traversal", "regular:3x4x4"),
    Case("traversal", "regular:7x2x1x1x1"),
    Case("terminal", "regular:3x4x4"),
    Case("typical", "regular:3x4x4"),
)


def measure(rounds: int, temperature: float, top_p: float) -> dict[str, Any]:
    """Seconds of every rule at T = 64 and V = 128256, and of the verification.

    All programs are run in turn, so that whatever else the machine does falls on all.
    """
    vocab = _TARGET.vocab_size
    sampling = Sampling(
        temperature=jnp.full(1, temperature, jnp.float32),
        top_k=jnp.zeros(1, jnp.int32),
        top_p=jnp.full(1, top_p, jnp.float32),
        min_p=jnp.zeros(1, jnp.float32),
        seed=jnp.ones(1, jnp.uint32),
    )
    rng = np.random.default_rng(0)
    # A target's logits, and a drafter's that are close to them.
    logits_VR = jnp.asarray(3 * rng.normal(size=(vocab, 64)), jnp.float32)
    draft_VR = logits_VR + jnp.asarray(rng.normal(size=(vocab, 64)), jnp.float32)
    programs = {}
    for depth in (1, 2):
        config = dataclasses.replace(_TARGET, num_layers=depth)
        model = Transformer(config, rngs=nnx.Rngs(0))
        sizes = EngineConfig(max_batch=1, max_len=1024)
        chain = shapes.parse("chain:63")
        programs[str(depth)] = costs.target_passes(model, chain, sizes, _PREFIX, 1)
    for case in CASES:
        decide, grow = _programs(case, logits_VR, draft_VR, sampling)
        programs[f"{case.rule} {case.tree}"] = decide
        programs[f"draw {case.rule} {case.tree}"] = grow
    seconds = costs.in_turn(programs, rounds)
    one, two = (np.array(seconds[name]) for name in ("1", "2"))
    layer = statistics.median(two - one)
    whole = statistics.median(one) + (LAYERS - 1) * layer
    figures = {}
    for case in CASES:
        name = f"{case.rule} {case.tree}"
        own = statistics.median(seconds[name])
        figures[name] = {
            "lossless": facts.FACTS[case.rule].lossless,
            "seconds": own,
            "share": own / whole,
            "draw_seconds": statistics.median(seconds[f"draw {name}"]),
        }
    return {
        "nodes": 64,
        "vocab": vocab,
        "temperature": temperature,
        "top_p": top_p,
        "rounds": rounds,
        "layer_seconds": layer,
        "one_layer_and_head_seconds": statistics.median(one),
        "verification_seconds": whole,
        "rules": figures,
    }


def _programs(case: Case, logits_VR, draft_VR, sampling):
    """Functions that judge, and that draw, one tree, and return the seconds it took."""
    shape = shapes.parse(case.tree)
    assert isinstance(shape, StaticShape) and shape.num_nodes == 64
    draws = facts.choose_draws(case.rule, "", shape)
    spec = SpeculativeConfig(rule=case.rule, tree=case.tree)
    rule, vocab, depth = rules.make(spec), logits_VR.shape[0], shape.depth
    at_B = jnp.full(1, _PREFIX, jnp.int32)

    @jax.jit
    def grow(draft_VR, sampling):
        uniforms = streams.of_proposal(sampling.seed, at_B, 64)
        context = DraftContext(
            active=jnp.ones(1, bool),
            root=jnp.ones(1, jnp.int32),
            lengths=at_B,
            page_table=jnp.zeros((1, 1), jnp.int32),
            sampling=sampling,
            noise=rules.ExactMatch().randomness(sampling, at_B, 64, depth, vocab)
            if draws == "shared"
            else None,
            uniforms=uniforms,
        )
        used = 1

        def expand(tokens_BW, depth, mask_BWU, scratch):
            nonlocal used
            first, used = used, used + tokens_BW.shape[1]
            return draft_VR[:, first:used], scratch

        return growth.grow(shape, context, draft_VR[:, :1], expand, 0.7, draws)

    @jax.jit
    def decide(tree, logits_VR, sampling):
        randomness = rule.randomness(sampling, at_B, 64, depth, vocab)
        return rule.decide(tree, logits_VR, sampling, randomness, depth)

    tree = grow(draft_VR, sampling)
    return (
        _timed(decide, tree, logits_VR, sampling),
        _timed(grow, draft_VR, sampling),
    )


def _timed(program, *args):
    def run():
        began = time.perf_counter()
        jax.block_until_ready(program(*args))
        return time.perf_counter() - began

    return run


def report(results: dict[str, Any]) -> str:
    """A Markdown table."""
    rows = [("rule", "", "tree", "ms", "of verification", "drawing the tree, ms")]
    for name, own in results["rules"].items():
        rule, tree = name.split()
        rows.append(
            (
                rule,
                facts.FACTS[rule].label,
                f"`{tree}`",
                f"{1e3 * own['seconds']:.1f}",
                f"{100 * own['share']:.1f} %",
                f"{1e3 * own['draw_seconds']:.1f}",
            )
        )
    return (
        f"T = {results['nodes']}, V = {results['vocab']}, temperature "
        f"{results['temperature']:g}, top-p {results['top_p']:g}; verification by "
        f"Llama-3.2-1B's shape takes {1e3 * results['verification_seconds']:.0f} ms "
        f"({LAYERS} layers, extrapolated from one and two)\n\n" + table.markdown(rows)
    )
