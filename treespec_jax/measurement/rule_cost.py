"""What an acceptance rule costs beside the verification that it judges."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from treespec_jax.acceptance import compatibility, rules
from treespec_jax.branches import is_straight
from treespec_jax.config import EngineConfig, SamplingParams, SpeculativeConfig
from treespec_jax.drafting import growth
from treespec_jax.drafting.protocol import DraftContext
from treespec_jax.engine.slots import sampling_of_all
from treespec_jax.measurement import step_cost, tables
from treespec_jax.measurement.machine import versions
from treespec_jax.measurement.output import say
from treespec_jax.measurement.timing import in_turn, spread, timed
from treespec_jax.models import presets
from treespec_jax.models.transformer import Transformer
from treespec_jax.sampling import policy
from treespec_jax.sampling.noise import Noise
from treespec_jax.sampling.randomness import Given, Randomness
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import StaticShape

# Llama-3.2-1B. Two stacks of different depth give the time of a layer, and of the head
# with all that does not repeat; 16 layers are extrapolated from these.
LAYERS, STACKS = 16, (1, 5)
# Turns of a rule per call.
STEPS = 8
_TARGET = presets.get("llama-3.2-1b")
_PREFIX = 512


# A rule and a tree shape.
CASES = (
    "exact regular:3x4x4",
    "exact chain:63",
    "token regular:3x4x4",
    "token regular:7x2x1x1x1",
    "token chain:63",
    "block chain:63",
    "traversal regular:3x4x4",
    "traversal regular:7x2x1x1x1",
    "terminal regular:3x4x4",
    "typical regular:3x4x4",
)


def measure(rounds: int, temperature: float, top_p: float) -> dict[str, Any]:
    """Seconds of every rule at T = 64 and V = 128256, and of the verification.

    All programs are run in turn, so that whatever else the machine does falls on all,
    and a rule's share is taken within a round. Some rules look at the accepted nodes
    alone, so each judges two trees: of a drafter whose logits are about the target's,
    and of one that has the very same, whose nodes are mostly accepted.
    """
    vocab = _TARGET.vocab_size
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=1)
    settings = sampling_of_all(1, params)
    sampling = jax.tree.map(jnp.asarray, policy.from_host(settings, is_straight(None)))
    rng = np.random.default_rng(0)
    # Zipf's distribution, as texts have it; the likeliest token has 0.4.
    falling_V = -1.5 * np.log1p(np.arange(vocab, dtype=np.float32))
    target = np.stack([rng.permutation(falling_V) for _ in range(64)], axis=1)
    logits_VR = jnp.asarray(target)
    about_VR = logits_VR + 0.7 * jnp.asarray(rng.normal(size=target.shape), jnp.float32)
    programs, accepted = {}, {}
    for depth in STACKS:
        say(f"compiling a target of {depth} layers")
        config = dataclasses.replace(_TARGET, num_layers=depth)
        model = Transformer(config, rngs=nnx.Rngs(0))
        sizes = EngineConfig(max_batch=1, max_len=1024)
        chain = shapes.parse("chain:63")
        programs[str(depth)] = step_cost.target_passes(model, chain, sizes, _PREFIX, 2)
    for number, case in enumerate(CASES, 1):
        say(f"compiling {case} ({number} of {len(CASES)})")
        decide, grow = _programs(*case.split())
        for kind, draft_VR in ("usual", about_VR), ("most", logits_VR):
            tree, noise = grow(draft_VR, sampling)
            args = tree, noise, logits_VR, sampling
            accepted[case, kind] = int(decide(*args)) / STEPS
            programs[f"{case} {kind}"] = timed(decide, *args)
        programs[f"{case} draw"] = timed(grow, about_VR, sampling)

    def tell(turn: int, each: float) -> None:
        rest = each * (rounds - turn)
        say(f"round {turn + 1} of {rounds}, about {rest:.0f} s to go")

    times = in_turn(programs, rounds, tell)
    seconds = {name: np.array(values) for name, values in times.items()}
    one, more = (seconds[str(depth)] for depth in STACKS)
    layer = (more - one) / (STACKS[1] - STACKS[0])
    whole = one + (LAYERS - 1) * layer
    figures = {}
    for case in CASES:
        figures[case] = {
            "lossless": compatibility.RULES[case.split()[0]].lossless,
            "draw_seconds": statistics.median(seconds[f"{case} draw"]),
        }
        for kind in "usual", "most":
            per_step = seconds[f"{case} {kind}"] / STEPS
            figures[case][kind] = {
                "accepted": accepted[case, kind],
                "seconds": spread(per_step.tolist()),
                "share": spread((per_step / whole).tolist()),
            }
    about = {"nodes": 64, "vocab": vocab, "batch": 1, "temperature": temperature}
    return about | {
        "top_p": top_p,
        "rounds": rounds,
        "layer_seconds": spread(layer.tolist()),
        "one_layer_and_head_seconds": spread(one.tolist()),
        "verification_seconds": spread(whole.tolist()),
        "rules": figures,
        "versions": versions(),
    }


def _programs(rule: str, tree: str):
    """Jitted functions that judge a tree STEPS times, and that propose one."""
    shape = shapes.parse(tree)
    assert isinstance(shape, StaticShape) and shape.num_nodes == 64
    proposal = compatibility.choose_proposal(rule, "", shape)
    decider = rules.make(SpeculativeConfig(rule=rule))
    vocab, depth = _TARGET.vocab_size, shape.depth
    root_B = jnp.full(1, _PREFIX, jnp.int32)

    @jax.jit
    def grow(draft_VR, sampling):
        """A tree, and the noise that was made for it."""
        randomness = Randomness(sampling, root_B, 64, depth, vocab)
        context = DraftContext(
            target=None,
            vocab=vocab,
            active=jnp.ones(1, bool),
            root=jnp.ones(1, jnp.int32),
            lengths=root_B,
            page_table=jnp.zeros((1, 1), jnp.int32),
            sampling=sampling,
            randomness=randomness,
            proposal=proposal,
        )
        used = 1

        def expand(level, scratch):
            nonlocal used
            first, used = used, used + level.tokens.shape[1]
            return draft_VR[:, first:used], scratch

        tree = growth.grow(shape, context, draft_VR[:, :1], expand, 0.7)
        return tree, randomness.noise()

    @jax.jit
    def decide(tree, noise, logits_VR, sampling):
        """As the engine runs it: in a loop, whose buffers live as long as it does.

        The exact rule finds the noise that its drafter made.
        """

        def body(turn, carry):
            # Nothing may be worked out once for all turns.
            now, _ = lax.optimization_barrier(
                ((tree, noise, logits_VR, sampling), (turn, carry))
            )
            tree_, noise_, logits_, sampling_ = now
            fresh = Randomness(sampling_, root_B + turn, 64, depth, vocab)
            shared = Noise(sampling_.seed, root_B + turn + 1, vocab, noise_.rows)
            randomness = Given(shared, decision=fresh.verdict())
            verdict = decider.decide(tree_, logits_, sampling_, randomness, depth)
            accepted, last = carry
            return accepted + jnp.sum(verdict.count), last + jnp.sum(verdict.emitted)

        return lax.fori_loop(0, STEPS, body, (0, 0))[0]

    return decide, grow


def report(results: dict[str, Any]) -> str:
    """A Markdown table."""
    head = ("rule", "", "tree", "accepted", "ms", "of verification")
    rows = [(*head, "most accepted", "of verification", "drawing, ms")]
    for name, figures in results["rules"].items():
        rule, tree = name.split()
        row = [rule, compatibility.RULES[rule].label, f"`{tree}`"]
        for kind in "usual", "most":
            row.append(f"{figures[kind]['accepted']:.1f}")
            if kind == "usual":
                row.append(tables.spread(figures[kind]["seconds"], ".1f", 1e3))
            row.append(tables.spread(figures[kind]["share"], ".1f", 100) + " %")
        rows.append((*row, f"{1e3 * figures['draw_seconds']:.0f}"))
    verification = tables.spread(results["verification_seconds"], ".0f", 1e3)
    return (
        f"T = {results['nodes']}, V = {results['vocab']}, batch {results['batch']}, "
        f"temperature {results['temperature']:g}, top-p {results['top_p']:g}, "
        f"{results['rounds']} rounds, medians (min–max); verification by "
        f"Llama-3.2-1B's shape takes {verification} ms ({LAYERS} layers, extrapolated "
        f"from {STACKS[0]} and {STACKS[1]})\n\n" + tables.markdown(rows)
    )
