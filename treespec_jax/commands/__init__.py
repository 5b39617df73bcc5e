"""The commands: one module each, and the settings and flags that they share.

A command's module is light to import. It has a docstring, whose first line describes
the command; `define()`, which defines the flags; and `main(given)`, which runs it on
their values (`absl.flags.FlagValues`) once the command line is parsed. One that takes
arguments besides flags names them in `ARGUMENTS`: `main(given, …)` gets those given.
"""

import time

# Commands report seconds since here; `cli` imports this before all else.
STARTED = time.perf_counter()
# As the scripts are named.
COMMANDS = (
    "generate",
    "benchmark",
    "evaluate",
    "compare_rules",
    "measure_rules",
    "calibrate_drafter",
    "calibrate_int8",
    "predict_speedup",
    "search_shape",
    "measure_costs",
    "list_models",
    "fetch_model",
    "convert_checkpoint",
    "widen_checkpoint",
    "generate_answers",
    "train_drafter",
    "train_lm",
    "tpu_report",
    "gpu_report",
    "tune_kernel",
    "benchmark_attention",
)
