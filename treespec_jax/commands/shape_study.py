"""What predict_speedup and search_shape share: acceptance and costs, measured."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from absl.flags import DEFINE_integer

from treespec_jax import limits
from treespec_jax.checks import check_int
from treespec_jax.commands import flags, loading, prompts, setting_flags
from treespec_jax.commands.settings import Experiment
from treespec_jax.drafting import METHODS
from treespec_jax.errors import UserError
from treespec_jax.measurement.output import say
from treespec_jax.trees import paths, shapes
from treespec_jax.trees.topology import Topology
from treespec_jax.tuning import theory
from treespec_jax.tuning.theory import Acceptance, Costs

# --help shows the flags below as those of the command that defines them.
absl_flags.disclaim_key_flags()

PLAIN, PROBE = "plain", "probe"
# The rest of a step is measured on its 16 nodes; no measured tree is deeper.
_SAMPLE = "regular:3x2x1"
# Lengths of texts are rounded up to it, so that compiled programs serve several runs.
_ROUNDING = 128
_SETTINGS = setting_flags.SettingFlags(
    # A machine by itself is measured.
    defaults={"engine.max_batch": 1, "sampling.max_tokens": 128},
    without=(
        *("speculative.tree", "speculative.recycle_table"),
        *("sampling.ignore_eos", "engine.record"),
    ),
)


def define() -> None:
    """The flags of both commands."""
    _SETTINGS.define()
    DEFINE_integer("probe_width", 8, "ranks whose acceptance is counted")
    DEFINE_integer("probe_depth", 5, "levels whose acceptance is counted")
    DEFINE_integer("rounds", 3, "runs of every shape on the prompts held out")
    flags.define("prompts_file", "compilation_cache")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured, checked.

    Attributes:
      settings: with their paths looked up.
      ids: token ids of the prompts; every second one is a half.
      probe: name of the tree that acceptance is counted with.
      rounds: runs of every shape; each samples by other seeds.
    """

    settings: Experiment
    ids: list[list[int]]
    probe: str
    rounds: int

    def variant(self, tree: str, record: bool = False) -> Experiment:
        """The settings with a tree."""
        settings = self.settings.with_tree(tree)
        engine = dataclasses.replace(settings.engine, record=record)
        return dataclasses.replace(settings, engine=engine)

    def as_dict(self, llm) -> dict[str, Any]:
        """The settings in force and the machine, as plain values for JSON."""
        from treespec_jax.measurement.machine import versions

        values = loading.in_force(self.settings, llm)
        del values["speculative"]["tree"]
        return {
            "settings": values,
            "versions": versions(),
            "probe": self.probe,
            "prompts": len(self.ids),
            "rounds": self.rounds,
        }


def make(given, trees: Sequence[str]) -> Job:
    """Checks all that weights are not needed for.

    Args:
      given: values of the flags.
      trees: shapes that will be grown, besides the probe.

    Raises:
      UserError: as `loading.check`; or fewer than two prompts, sizes that are no tree,
        or a shape that is not fixed.
    """
    settings = _SETTINGS.experiment()
    if settings.speculative.method == "none":
        raise UserError("method 'none' grows no trees; leave it out")
    for name in ("probe_width", "probe_depth", "rounds"):
        check_int(name, given[name].value, 1)
    probe = _probe(given.probe_width, given.probe_depth)
    for tree in trees:
        if not isinstance(shapes.parse(tree), shapes.StaticShape):
            raise UserError(
                f"tree {tree!r} takes another form at every step; give a fixed one, "
                "such as chain:3 or static:0.0+1"
            )
    settings = settings.with_tree(probe)
    takes_model = METHODS[limits.resolve(settings.speculative).method].takes_model
    settings = settings.with_paths(takes_model)
    texts = prompts.read_or_stories(given.prompts_file)
    if len(texts) < 2:
        raise UserError(
            "one prompt cannot be divided: each half of them is predicted by the "
            "other; give two or more"
        )
    ids = loading.check(settings, texts, [probe, *trees])
    settings = _fitting(settings, ids)
    return Job(settings, ids, probe, given.rounds)


def _probe(width: int, depth: int) -> str:
    topology = theory.probe(min(width, shapes.MAX_NODES), min(depth, 16))
    if topology.num_nodes > shapes.MAX_NODES:
        raise UserError(
            f"a probe of width {width} and depth {depth} has "
            f"{topology.num_nodes - 1} nodes, and {shapes.MAX_NODES - 1} fit; lower "
            "--probe_width or --probe_depth"
        )
    return paths.text_of(topology)


def _fitting(settings: Experiment, ids: Sequence[Sequence[int]]) -> Experiment:
    """The settings with room for these texts, if no --max_len is given."""
    if settings.engine.max_len is not None:
        return settings
    _, limit = loading.check_models(settings, [settings.speculative.tree])
    longest = max(map(len, ids)) + settings.sampling.max_tokens
    rounded = -(-longest // _ROUNDING) * _ROUNDING
    engine = dataclasses.replace(settings.engine, max_len=min(rounded, limit))
    return dataclasses.replace(settings, engine=engine)


@dataclasses.dataclass
class Bench:
    """The models, and what was measured with them.

    Attributes:
      job: what is measured.
      pair: the loaded models.
      llms: of plain decoding and of the probe.
      acceptance: counted on all prompts.
      halves: counted on the first, third, … and on the second, fourth, … prompt.
      emitted: tokens of the first prompt.
    """

    job: Job
    pair: loading.Pair
    llms: dict[str, Any]
    acceptance: Acceptance
    halves: tuple[Acceptance, Acceptance]
    emitted: list[int]

    def held_out(self, topology: Topology) -> float:
        """Tokens per step over all prompts, each half predicted by the other.

        Halves emit equally many tokens, so that their steps are averaged.
        """
        tokens = (theory.expected_tokens(topology, half) for half in self.halves)
        return statistics.harmonic_mean(tokens)

    def costs(self, largest: int) -> Costs:
        """Of trees of up to so many nodes, the root included."""
        from treespec_jax.measurement import shape_costs, step_cost

        say("measuring costs")
        plain, variant = self.llms[PLAIN], self.job.variant(_SAMPLE)
        sample = loading.make_llms({_SAMPLE: variant}, self.pair)[_SAMPLE]
        for llm in (plain, sample):
            step_cost.warm_up(llm, self.job.ids[:1])
        prefix = step_cost.middle_of(sample, self.job.ids[0], self.emitted)
        target, sampling = self.pair.target.model, self.job.settings.sampling
        bench = shape_costs.Bench(plain, sample, target, prefix, sampling)
        return bench.measure(largest)

    def compare(self, trees: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Figures of plain decoding and of trees on the prompts."""
        from treespec_jax.measurement import rounds, step_cost

        job = self.job
        variants = {tree: job.variant(tree) for tree in trees if tree != "none"}
        llms = {PLAIN: self.llms[PLAIN]} | loading.make_llms(variants, self.pair)
        for name, llm in llms.items():
            say(f"compiling {name}")
            step_cost.warm_up(llm, job.ids)
        done = []
        for number in range(job.rounds):
            say(f"round {number + 1} of {job.rounds}")
            sampling = _seeded(job, number * len(job.ids))
            done.append(rounds.run_round(llms, job.ids, sampling, number))
        plain = [run[PLAIN] for run in done]
        return {n: rounds.summary([run[n] for run in done], plain) for n in llms}


def _seeded(job: Job, more: int):
    sampling = job.settings.sampling
    return sampling.for_text(more)


def measure(job: Job) -> Bench:
    """Loads the models and counts acceptance.

    Raises:
      UserError: an unreadable checkpoint, or sizes that do not fit.
    """
    from treespec_jax.measurement import rounds, step_cost

    pair = loading.load_pair(job.settings)
    variants = {PLAIN: job.variant("none"), PROBE: job.variant(job.probe, record=True)}
    llms = loading.make_llms(variants, pair)
    say("compiling the probe")
    step_cost.warm_up(llms[PROBE], job.ids)
    say("counting acceptance")
    records, emitted = ([], []), []
    # Greedy texts are the same in every round.
    for number in range(job.rounds if job.settings.sampling.temperature else 1):
        sampling = _seeded(job, number * len(job.ids))
        for index, ids in enumerate(job.ids):
            one = sampling.for_text(index)
            run = rounds.run_round({PROBE: llms[PROBE]}, [ids], one, 0)[PROBE]
            records[index % 2].extend(run.records)
            emitted += run.token_ids
    halves = theory.count(records[0]), theory.count(records[1])
    whole = theory.count([*records[0], *records[1]])
    return Bench(job, pair, llms, whole, halves, emitted[0])
