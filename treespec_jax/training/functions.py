"""Training a drafter from Python, in one call."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from treespec_jax import checkpoints
from treespec_jax.checkpoints import drafters
from treespec_jax.checkpoints.drafters import LoadedDrafter
from treespec_jax.checkpoints.loading import LoadedModel
from treespec_jax.checks import from_mapping
from treespec_jax.errors import UserError
from treespec_jax.training import drafter_data, drafter_loop, drafter_settings
from treespec_jax.training.answers import Answers, from_texts, read_answers
from treespec_jax.training.drafter_settings import AnswersConfig

Target = str | Path | LoadedModel
TrainingData = str | Path | Sequence[str]


def train_medusa_heads(
    base_model: Target,
    num_heads: int = 3,
    training_data: TrainingData = (),
    epochs: float = 1,
    output: str | Path | None = None,
    **settings: Any,
) -> LoadedDrafter:
    """Trains Medusa heads for a model.

    For example

      heads = train_medusa_heads("tinystories-5m", training_data="runs/stories")
      llm = LLM("tinystories-5m", speculative={"model": heads})

    Args:
      base_model: path or name of the target, or a loaded one, which is then used in
        its dtype. It stays as it is.
      num_heads: K; head k guesses the token k + 2 places on.
      training_data: texts, a text file, or a folder of `generate_answers`. Texts of the
        target's own teach most.
      epochs: passes over them.
      output: folder for checkpoints, the curve and the drafter; the same call goes on
        with what it holds. None: a temporary one.
      **settings: parts of a `train_drafter` configuration that win over what is usual,
        such as `drafter={"vocab": 8192}` or `optimizer={"peak": 2e-3}`.

    Returns:
      what `SpeculativeConfig.model` takes, in the target's dtype.

    Raises:
      UserError: as `drafter_loop.train`; training data of no known kind.
    """
    usual = {
        "method": "medusa",
        "drafter": {"heads": num_heads},
        "objective": {"predictions": num_heads},
    }
    return _train(base_model, usual, settings, training_data, (epochs, output))


def train_eagle(
    base_model: Target,
    generation: int = 3,
    training_data: TrainingData = (),
    epochs: float = 1,
    output: str | Path | None = None,
    **settings: Any,
) -> LoadedDrafter:
    """Trains an EAGLE layer for a model; the rest is as of `train_medusa_heads`.

    Args:
      base_model: the target.
      generation: 1 or 3, as of `EagleConfig`.
      training_data: see there.
      epochs: see there.
      output: see there.
      **settings: see there.

    Raises:
      UserError: as there, or another generation.
    """
    if generation not in (1, 3):
        raise UserError(f"generation must be 1 or 3, got {generation!r}")
    usual = {"method": "eagle3" if generation == 3 else "eagle"}
    return _train(base_model, usual, settings, training_data, (epochs, output))


def _train(base_model, usual, settings, training_data, how) -> LoadedDrafter:
    """Trains for `how`: epochs, and a folder or None."""
    epochs, output = how
    target = base_model
    if not isinstance(target, LoadedModel):
        on_cpu = jax.default_backend() == "cpu"
        target = checkpoints.load(target, "float32" if on_cpu else "bfloat16")
    data = settings.get("data", {})
    separator = from_mapping(AnswersConfig, data, "data").separator
    answers = _answers(training_data, separator, target)
    values = _merged({"data": _rows(answers, target, data), **usual}, settings)
    values["target"] = target.source
    data = from_mapping(AnswersConfig, values["data"], "data")
    rows, _ = drafter_data.load(data, target, answers)
    steps = max(2, math.ceil(epochs * len(rows.tokens) / data.batch_rows))
    schedule = {"steps": steps, "warmup": max(1, steps // 20), "decay": steps // 5}
    values["optimizer"] = schedule | {"peak": 1e-3} | values.get("optimizer", {})
    with tempfile.TemporaryDirectory() as temporary:
        run = {"output": str(output or temporary), "export_dtype": "float32"}
        values["run"] = run | values.get("run", {})
        config = drafter_settings.build(values)
        result = drafter_loop.train(config, target, answers)
        if not result.finished:
            raise UserError(
                f"training stopped at step {result.step} of {steps}; the same call "
                "with output=FOLDER goes on"
            )
        return drafters.load_drafter(
            drafters.describe_drafter(result.path, target), target
        )


def _answers(
    training_data: TrainingData, separator: str, target: LoadedModel
) -> Answers:
    if isinstance(training_data, (str, Path)):
        path = Path(training_data).expanduser()
        if path.is_dir():
            return read_answers(path)
        config = AnswersConfig(text=(str(path),), separator=separator)
        return drafter_data.read(config, target)
    texts = list(training_data)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(
            "training_data must be texts, a text file or a folder of generate_answers"
        )
    return from_texts(texts, drafter_data.tokenizer_of(target))


def _rows(answers: Answers, target: LoadedModel, given: Mapping[str, Any]):
    """Usual settings of rows, small enough for few texts; `given` are the user's."""
    row_tokens = given.get("row_tokens", min(256, target.config.max_positions))
    # A tenth, or a row, is held out.
    rows = int(0.9 * len(answers.tokens)) // row_tokens - 1
    batch_rows = max(1, min(16, rows))
    micro_rows = math.gcd(batch_rows, 4)
    return {
        "row_tokens": row_tokens,
        "batch_rows": batch_rows,
        "micro_rows": micro_rows,
    }


def _merged(usual: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, `given` on top."""
    merged = dict(usual)
    for name, value in given.items():
        if isinstance(value, Mapping):
            value = _merged(merged.get(name, {}), value)
        merged[name] = value
    return merged
