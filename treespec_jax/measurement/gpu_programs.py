"""The programs that a GPU runs for different requests, counted without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from treespec_jax.config import SamplingParams
from treespec_jax.measurement import compilation, gpu_kernels, lowered
from treespec_jax.measurement.tables import markdown

REQUESTS = {
    "greedy": SamplingParams(),
    "temperature 1": SamplingParams(temperature=1.0),
    "temperature 1, top-p 0.9": SamplingParams(temperature=1.0, top_p=0.9),
}


def study(job: compilation.Job, compiled: bool) -> tuple[Callable, Callable]:
    """Functions that lower, and compile, a step for every kind of request.

    Args:
      job: what to compile; of its settings those of the step.
      compiled: whether kernels are counted too.

    Returns:
      A function to plain data, and one from these to Markdown.
    """

    def measure() -> dict[str, Any]:
        where, note = None, "not asked for"
        if compiled:
            try:
                where, note = gpu_kernels.device(), ""
            except gpu_kernels.CompilerUnavailable as error:
                note = str(error)
        engine = compilation.abstract_engine(job)
        programs = {}
        for name, params in REQUESTS.items():
            function, arguments = engine.program(params, straight=True)
            counts = lowered.counts(lowered.lower(function, arguments, "cuda"))
            programs[name] = {"lowered": dataclasses.asdict(counts)}
            if where is not None:
                text = gpu_kernels.compile_step(function, arguments, where)
                found = gpu_kernels.kernels_of_loop(text)
                kernels = {**dataclasses.asdict(found), "total": found.total}
                programs[name]["kernels"] = kernels
        return {
            "job": dataclasses.asdict(job),
            "jax": jax.__version__,
            "device": where.device_kind if where is not None else None,
            "note": note,
            "programs": programs,
        }

    return measure, table


def table(results: dict[str, Any]) -> str:
    """A row per kind of request."""
    job, compiled = compilation.Job(**results["job"]), results["device"] is not None
    head = ["requests", "loops inside the step", "conditionals", "sorts", "top-ks"]
    if compiled:
        kinds = "kernels", "products", "attention", "sorts", "copies", "others"
        head += [*kinds, "host reads"]
    rows = [head]
    for name, program in results["programs"].items():
        before = program["lowered"]
        columns = "inner_loops", "conditionals", "sorts", "top_ks"
        row = [name, *(str(before[column]) for column in columns)]
        if compiled:
            after = program["kernels"]
            kinds = "total", "products", "attention", "sorts", "copies", "fusions"
            row += [str(after[kind]) for kind in kinds]
            row.append(str(after["loops"] + after["conditionals"]))
        rows.append(row)
    about = (
        f"Step of {job.model} with tree {job.tree}, {job.types}, {job.batch} slots, "
        f"lowered for CUDA by jax {results['jax']}"
    )
    if compiled:
        about += f", and per step after fusion for {results['device']}"
    else:
        about += f"; kernels after fusion are not counted: {results['note']}"
    return f"{about}.\n\n{markdown([tuple(row) for row in rows])}"
