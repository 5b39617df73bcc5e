"""Times every acceptance rule at 64 nodes beside the verification by a 1B target."""

import json
from pathlib import Path

from absl import flags

from treespec_jax import cli
from treespec_jax.config import check_float, check_int

_ROUNDS = flags.DEFINE_integer("rounds", 9, "measurements of each program")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "of the requests")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "of the requests")
_OUTPUT = flags.DEFINE_string("output", "", "folder to write to")
_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "its folder; else the user's cache folder; '' is none"
)


def main(_):
    check_int("rounds", _ROUNDS.value, 1)
    check_float("temperature", _TEMPERATURE.value, 0)
    check_float("top_p", _TOP_P.value, 0, 1, open_low=True)

    # Heavy imports only now, so that a bad flag answers at once.
    from treespec_jax.experiments import output, rule_costs, runtime

    runtime.set_up(_CACHE.value)
    with output.folder(_OUTPUT.value) as work:
        results = rule_costs.measure(_ROUNDS.value, _TEMPERATURE.value, _TOP_P.value)
        results["versions"] = runtime.versions()
        report = rule_costs.report(results)
        (work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (work / "results.md").write_text(report + "\n")
    print(report)
    print(f"\nwrote {Path(_OUTPUT.value) / 'results.md'}, results.json beside it")


if __name__ == "__main__":
    cli.run(main)
