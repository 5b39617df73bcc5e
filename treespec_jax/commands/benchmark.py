"""Compares ways of decoding on a suite of questions; tables by task, JSON and a plot.

A grid of methods, tree shapes, rules, temperatures and batch sizes runs in turn; the
same command goes on where it was interrupted. In minutes on two cores:

  benchmark --quick --output=runs/quick

docs/benchmark.md describes suites, grids and figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl.flags import DEFINE_bool

from treespec_jax import distributed
from treespec_jax.commands import (
    benchmark_job,
    flags,
    loading,
    runtime,
    setting_flags,
    verifying,
)
from treespec_jax.commands.benchmark_job import Job
from treespec_jax.errors import UserError
from treespec_jax.measurement import peers
from treespec_jax.measurement.grid import ANSWER, Combination, Task
from treespec_jax.measurement.journal import FILE, Journal
from treespec_jax.measurement.output import Study, check_folder, say
from treespec_jax.measurement.suite import Conversation

_QUICK = {
    "benchmark.questions": 1,
    "benchmark.rounds": 1,
    "benchmark.latency_tokens": 16,
    "benchmark.shapes": ("chain:3", "dynamic:7@4"),
    "benchmark.breakdown": False,
    "sampling.max_tokens": 32,
}
_SETTINGS = setting_flags.SettingFlags(
    more=("benchmark",),
    # A machine by itself is measured.
    defaults={"engine.max_batch": 1},
    # --weights is that of the grid.
    without=("speculative.tree", "weights"),
)


def define() -> None:
    _SETTINGS.define()
    words = "a question per category, one round of short answers, two shapes"
    DEFINE_bool("quick", False, words)
    DEFINE_bool("overwrite", False, "replace results of other settings")
    flags.define("output", "verify_lossless", "compilation_cache", *flags.CLUSTER)


def main(given) -> int | None:
    settings = _SETTINGS.experiment(_QUICK if given.quick else None)
    if given.distributed and settings.benchmark.breakdown:
        raise UserError(
            "the parts of a step are timed in one process; give --nobreakdown with "
            "--distributed"
        )
    verifying.check_alone(given, "verify_lossless")
    job = benchmark_job.make(settings)
    if given.verify_lossless:
        _check_verified(job)
    settings = runtime.join(given, job.settings)
    if distributed.is_follower():
        runtime.set_up(given.compilation_cache)
        return loading.follow()
    folder = check_folder(given.output)
    job = dataclasses.replace(job, settings=settings)
    journal = Journal(folder, job.identity, given.overwrite)

    # Heavy imports only now, so that a bad flag answers at once.
    runtime.set_up(given.compilation_cache)
    from treespec_jax.measurement import plots, suite_report

    try:
        results = measure(job, journal, given.verify_lossless)
    except KeyboardInterrupt:
        if journal.header is not None:
            say(f"{Path(given.output) / FILE} holds what is done; repeat the command")
        raise
    study = Study(lambda: results, suite_report.table, plots.save_suite)
    study.carry_out(given.output)
    if not given.verify_lossless:
        return None
    from treespec_jax.measurement.exactness import Verdict

    return max(
        verifying.report(
            Verdict.from_dict(values),
            quiet=True,
            name=str(Combination.of(values)),
        )
        for values in results["exactness"]
    )


def _check_verified(job: Job) -> None:
    """Refuses a comparison with plain decoding that would say nothing."""
    verifying.check_whole([job.settings.sampling])
    if not job.keep_text:
        raise UserError(
            "--verify_lossless compares tokens, and nothing here promises those of "
            "plain decoding; add a shape to --shapes, with rule exact and no cascade"
        )


def measure(job: Job, journal: Journal, verify: bool = False) -> dict[str, Any]:
    """Measures what the journal lacks; all figures, as plain values for JSON.

    Args:
      job: what is measured.
      journal: where it goes.
      verify: compare what keeps the text with plain decoding, token by token.

    Raises:
      UserError: an unreadable checkpoint, settings that do not fit together, or a
        journal of other versions.
    """
    from treespec_jax.measurement import (
        breakdown,
        suite_exactness,
        suite_report,
        suite_run,
    )

    if job.left_out:
        say(f"left out, too long for max_len: {', '.join(job.left_out)}")
    for one in job.skipped:
        say(f"skipped: {one['what']}: {one['reason']}")
    tasks = [task for task in job.tasks if not suite_run.is_done(task, journal)]
    steps = list(dict.fromkeys(c.program for c in job.variants if not c.peer))
    if not job.settings.benchmark.breakdown or breakdown.is_done(steps, journal):
        steps = []
    checks = [
        one
        for one in (job.keep_text if verify else ())
        if not suite_exactness.is_done(one, journal)
    ]
    if tasks or steps or checks:
        Run(job, journal, tasks, steps, checks).carry_out()
    details = {
        "suite": {
            "name": job.suite.name,
            "questions": len(job.suite.questions),
            "digest": job.suite.digest,
        },
        "chat": job.chat,
        "skipped": job.skipped,
        "left_out": job.left_out,
    }
    return suite_report.results(journal, list(job.variants), details)


@dataclasses.dataclass
class Run:
    """Measurements of one process.

    Attributes:
      job: what is measured.
      journal: where its lines go.
      tasks: that it lacks, in order.
      steps: programs whose steps it lacks.
      checks: combinations to compare with plain decoding.
    """

    job: Job
    journal: Journal
    tasks: Sequence[Task]
    steps: Sequence[Combination]
    checks: Sequence[Combination]

    def carry_out(self) -> None:
        """Loads, compiles, runs the tasks, and takes the steps apart."""
        from treespec_jax.measurement.engine_decoder import EngineDecoder
        from treespec_jax.measurement.machine import versions

        settings = self.job.settings
        timed = {*(task.combination.program for task in self.tasks), *self.steps}
        compared = (c for check in self.checks for c in (check, check.baseline))
        wanted = timed | {c.program for c in compared}
        variants = {c.program: v for c, v in self.job.variants.items() if not c.peer}
        # Peers alone may be missing; what is in force is still asked of an `LLM`.
        ours = {c: v for c, v in variants.items() if c in wanted}
        ours = ours or dict(list(variants.items())[:1])
        pairs = self._load(dict.fromkeys(c.weights for c in ours))
        llms = {}
        for weights, pair in pairs.items():
            some = {c: v for c, v in ours.items() if c.weights == weights}
            llms |= loading.make_llms(some, pair)
        any_llm = next(iter(llms.values()))
        options = dict(settings.benchmark.chat_options)
        decoders: dict[Combination, Any] = {
            program: EngineDecoder(llm, options) for program, llm in llms.items()
        }
        for weights in benchmark_job.weight_types(settings):
            decoders |= self._peer_decoders(weights, any_llm.dtype)
        others = peers.versions() if settings.benchmark.peers else {}
        in_force = loading.in_force(settings, any_llm, "benchmark")
        for name in ("tree", "tau"):
            del in_force["speculative"][name]
        if settings.benchmark.weights:
            del in_force["weights"]
        self.journal.begin(versions() | others, {"in_force": in_force})
        for program in filter(timed.__contains__, decoders):
            say(f"compiling {program.label}, batch {program.batch}")
            decoders[program].warm_up(settings.sampling)
        workload = self._workload(any_llm.engine.config.max_len)
        self._answer(decoders, workload)
        targets = {weights: pair.target for weights, pair in pairs.items()}
        self._verify(llms, targets, workload)
        if self.steps:
            self._take_apart(llms, {w: target.model for w, target in targets.items()})

    def _load(self, types: Iterable[str]) -> dict[str, loading.Pair]:
        """Models in each type of weights, one after the other; all of them stay.

        Their answers are compared in turn, for which all have to be in memory.
        """
        settings, pairs = self.job.settings, {}
        benchmark_job.check_memory(self.job, types)
        for weights in types:
            if weights:
                say(f"loading {weights} weights")
            pairs[weights] = loading.load_pair(
                dataclasses.replace(settings, weights=weights)
            )
        return pairs

    def _peer_decoders(self, weights: str, dtype: str) -> dict[Combination, Any]:
        """Decoders of `transformers` for the tasks that ask for them.

        Args:
          weights: of the combinations.
          dtype: of all of a peer, if they name no type.
        """
        settings, target = self.job.settings, self.job.target
        asked = (task.combination for task in self.tasks)
        programs = dict.fromkeys(
            c.program for c in asked if c.peer and c.weights == weights
        )
        if not programs:
            return {}
        checkpoints = peers.Checkpoints(
            *benchmark_job.folders(settings),
            weights or dtype,
            target.tokenizer,
            target.config.eos_ids,
        )
        made = peers.load(checkpoints)
        return {program: made[program.shape] for program in programs}

    def _workload(self, max_len: int):
        """What is asked, as a `suite_run.Workload`."""
        from treespec_jax.measurement import suite_run

        job = self.job
        return suite_run.Workload(
            job.suite,
            job.settings.sampling,
            job.settings.benchmark.latency_tokens,
            job.chat,
            job.encode,
            max_len,
        )

    def _answer(self, decoders: dict[Combination, Any], workload) -> None:
        import tqdm

        from treespec_jax.measurement import suite_run

        job = self.job
        total, rest = (
            sum(len(task.questions) for task in tasks)
            for tasks in (job.tasks, self.tasks)
        )
        with tqdm.tqdm(
            total=total, initial=total - rest, unit="answer", mininterval=1
        ) as bar:

            def progress(task: Task) -> None:
                bar.set_postfix_str(str(task.combination), refresh=False)
                bar.update(len(task.questions))

            suite_run.run(self.tasks, decoders, workload, self.journal, progress)

    def _verify(self, llms: dict[Combination, Any], targets, workload) -> None:
        """Compares the journal's answers, all of which are there."""
        from treespec_jax.measurement import exactness, suite_exactness

        rounds = self.job.settings.benchmark.rounds
        for check in self.checks:
            probed = verifying.probe(llms[check.program], targets[check.weights].model)
            say(f"comparing {check} with plain decoding: {probed}")
            texts = suite_exactness.pairs(check, workload, rounds, self.journal)
            plain = llms[check.baseline.program]
            found = exactness.verdict(plain, texts, probed).as_dict()
            cell = dataclasses.asdict(check)
            self.journal.add(suite_exactness.EXACTNESS, [(cell, found)])

    def _take_apart(self, llms: dict[Combination, Any], targets) -> None:
        """Behind the first half of the first answer by plain decoding."""
        from treespec_jax.measurement.breakdown import Breakdown

        job = self.job
        question = job.suite.questions[0]
        plain = next(task for task in job.tasks if task.combination.plain)
        line = self.journal.find(ANSWER, plain.cell(question))
        Breakdown(
            llms={program: llms[program] for program in self.steps},
            targets=targets,
            prompt=job.encode(Conversation(question, job.chat).prompt()),
            emitted=line["token_ids"][0],
            params=dataclasses.replace(
                job.settings.sampling, temperature=plain.combination.temperature
            ),
        ).run(self.journal, say)
