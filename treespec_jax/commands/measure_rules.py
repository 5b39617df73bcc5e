"""Times every acceptance rule at 64 nodes beside the verification by a 1B target."""

from __future__ import annotations

import functools

from absl.flags import DEFINE_float, DEFINE_integer

from treespec_jax.checks import check_float, check_int
from treespec_jax.commands import flags, runtime
from treespec_jax.measurement.output import Study


def define() -> None:
    DEFINE_integer("rounds", 9, "measurements of each program")
    DEFINE_float("temperature", 1.0, "of the requests")
    DEFINE_float("top_p", 1.0, "of the requests")
    flags.define("output", "compilation_cache")


def main(given) -> None:
    rounds, temperature, top_p = given.rounds, given.temperature, given.top_p
    check_int("rounds", rounds, 1)
    check_float("temperature", temperature, 0)
    check_float("top_p", top_p, 0, 1, open_low=True)

    # Heavy imports only now, so that a bad flag answers at once.
    runtime.set_up(given.compilation_cache)
    from treespec_jax.measurement import rule_cost

    measure = functools.partial(rule_cost.measure, rounds, temperature, top_p)
    Study(measure, rule_cost.report).carry_out(given.output)
