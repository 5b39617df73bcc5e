"""Frozen settings of one training run, built from a configuration file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from treespec_jax.checks import check_float, check_int, from_mapping
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """One text file.

    Attributes:
      path: of a UTF-8 text.
      weight: how often an epoch shows its rows; 0.5 shows half of them.
      separator: regular expression between documents; empty: the file is one.
      replace: pairs (regular expression, replacement), applied in order before the
        text is split.
      lower: make it lower case.
      min_chars: shorter documents are left out.
    """

    path: str
    weight: float = 1.0
    separator: str = ""
    replace: tuple[tuple[str, str], ...] = ()
    lower: bool = False
    min_chars: int = 1

    def __post_init__(self):
        check_float(f"weight of {self.path}", self.weight, 0, open_low=True)
        check_int("min_chars", self.min_chars, 0)
        object.__setattr__(self, "replace", tuple(map(tuple, self.replace)))
        for pattern in [self.separator, *(old for old, _ in self.replace)]:
            try:
                re.compile(pattern)
            except re.error as e:
                raise UserError(f"bad pattern {pattern!r}: {e}") from None


def check_rows(data: Any) -> None:
    """Checks `row_tokens`, `batch_rows`, `micro_rows` and `held_out` of some settings.

    Raises:
      UserError: one is out of range, or batches are not whole runs of rows.
    """
    for name in ("row_tokens", "batch_rows", "micro_rows"):
        check_int(f"data.{name}", getattr(data, name), 1)
    check_float("data.held_out", data.held_out, 0, 0.5, open_low=True)
    if data.batch_rows % data.micro_rows:
        raise UserError(
            f"data.batch_rows={data.batch_rows} is not a multiple of "
            f"micro_rows={data.micro_rows}"
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What one optimiser step sees.

    Attributes:
      sources: the texts.
      row_tokens: T, tokens of a packed row.
      batch_rows: rows of one optimiser step.
      micro_rows: rows of one forward and backward pass; gradients are accumulated
        over batch_rows / micro_rows of them. Small ones stay in a CPU's caches.
      held_out: share of each source's rows, at its end, kept for measuring.
      seed: of the order of rows.
    """

    sources: tuple[Source, ...]
    row_tokens: int = 256
    batch_rows: int = 8
    micro_rows: int = 4
    held_out: float = 0.02
    seed: int = 0

    def __post_init__(self):
        check_rows(self)
        if not self.sources:
            raise UserError("no text to train on: give --text=PATH or data.sources")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a decay to a floor.

    Attributes:
      steps: of the whole schedule.
      peak: learning rate after warm-up.
      warmup: steps of it.
      decay: steps of a linear decay at the end, before which the rate stays at its
        peak, so that a run can be made longer underway; 0: a cosine from the warm-up
        on.
      floor: last learning rate as a share of the peak.
      weight_decay: on matrices only.
      clip: global norm of the gradient at most.
      beta2: of Adam.
    """

    steps: int = 2000
    peak: float = 1.5e-3
    warmup: int = 100
    decay: int = 0
    floor: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    beta2: float = 0.98

    def __post_init__(self):
        check_int("optimizer.steps", self.steps, 1)
        check_int("optimizer.warmup", self.warmup, 0)
        check_int("optimizer.decay", self.decay, 0)
        check_float("optimizer.peak", self.peak, 0, open_low=True)
        check_float("optimizer.floor", self.floor, 0, 1)
        check_float("optimizer.weight_decay", self.weight_decay, 0)
        check_float("optimizer.clip", self.clip, 0, open_low=True)
        check_float("optimizer.beta2", self.beta2, 0, 1)
        if self.warmup + self.decay >= self.steps:
            decay = f" and decay={self.decay}" if self.decay else ""
            raise UserError(
                f"optimizer.warmup={self.warmup}{decay} must be below "
                f"steps={self.steps}{' together' if decay else ''}"
            )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation (Hinton et al., 1503.02531).

    Attributes:
      teacher: path of a checkpoint; empty: none.
      weight: w in (1 - w) · cross entropy + w · KL(teacher ‖ student).
    """

    teacher: str = ""
    weight: float = 0.8

    def __post_init__(self):
        check_float("distill.weight", self.weight, 0, 1)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a run is carried out; none of it changes the result.

    Attributes:
      output: folder for checkpoints, the loss curve and the exported model.
      save_minutes: between checkpoints.
      eval_every: steps between measurements of the held-out loss.
      eval_rows: held-out rows measured then, at most.
      stop_after: end the process after this many steps of it; 0: no limit.
      progress: show a progress bar.
      export_dtype: of the exported model.
      sample: prompt of the text shown at the end.
    """

    output: str = ""
    save_minutes: float = 5.0
    eval_every: int = 100
    eval_rows: int = 64
    stop_after: int = 0
    progress: bool = True
    export_dtype: str = "bfloat16"
    sample: str = "once upon a time"

    def __post_init__(self):
        check_float("run.save_minutes", self.save_minutes, 0)
        for name, low in [("eval_every", 1), ("eval_rows", 1), ("stop_after", 0)]:
            check_int(f"run.{name}", getattr(self, name), low)
        if not self.output:
            raise UserError("no output folder: give --output=FOLDER")
        if self.export_dtype not in ("bfloat16", "float32"):
            raise UserError(
                "run.export_dtype must be bfloat16 or float32, got "
                f"{self.export_dtype!r}"
            )


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
    """The sentencepiece vocabulary.

    Attributes:
      path: of a .model file, or a checkpoint folder that holds one; empty: train one.
      size: of a new one.
    """

    path: str = ""
    size: int = 2048

    def __post_init__(self):
        # 256 bytes, unk, bos, eos and the newline are always there.
        check_int("vocabulary.size", self.size, 270)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. `model.vocab_size` is that of the vocabulary.

    Attributes:
      seed: of the initial parameters.
    """

    data: DataConfig
    model: ModelConfig
    run: RunConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    distill: DistillConfig = DistillConfig()
    vocabulary: VocabularyConfig = VocabularyConfig()
    seed: int = 0

    def __post_init__(self):
        if self.data.row_tokens > self.model.max_positions:
            raise UserError(
                f"data.row_tokens={self.data.row_tokens} exceeds "
                f"model.max_positions={self.model.max_positions}"
            )

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share: all but `run`, paths and the steps.

        The schedule may be made longer or shorter underway.
        """
        values = dataclasses.asdict(self)
        del values["optimizer"]["steps"]
        del values["run"], values["vocabulary"]
        for source in values["data"]["sources"]:
            del source["path"]
        values["distill"]["teacher"] = bool(self.distill.teacher)
        return values


def build(values: Mapping[str, Any]) -> TrainConfig:
    """Turns a nested mapping (a configuration file) into checked settings.

    Raises:
      UserError: an unknown key or a bad value, named.
    """
    values = dict(values)
    data = dict(values.get("data", {}))
    sources = data.get("sources", {})
    data["sources"] = tuple(
        from_mapping(Source, value, f"data.sources.{name}")
        for name, value in sources.items()
    )
    values["data"] = from_mapping(DataConfig, data, "data")
    # The real size follows from the vocabulary.
    model = {"vocab_size": 1, **values.get("model", {})}
    values["model"] = from_mapping(ModelConfig, model, "model")
    parts = {
        "run": RunConfig,
        "optimizer": OptimizerConfig,
        "distill": DistillConfig,
        "vocabulary": VocabularyConfig,
    }
    for name, cls in parts.items():
        values[name] = from_mapping(cls, values.get(name, {}), name)
    return from_mapping(TrainConfig, values, "configuration")
