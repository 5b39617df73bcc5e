"""Frozen settings of one drafter's training, built from a configuration file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from treespec_jax.checks import check_bool, check_float, check_int, from_mapping
from treespec_jax.errors import UserError
from treespec_jax.models.drafter_config import check_layers
from treespec_jax.training.settings import OptimizerConfig, check_rows

METHODS = ("eagle", "eagle3", "medusa", "draft_model")


@dataclasses.dataclass(frozen=True)
class AnswersConfig:
    """What the drafter learns from.

    Attributes:
      answers: folders that `generate_answers` wrote.
      text: text files; the target is taken to have written all of them.
      separator: regular expression between their documents; "": each is one.
      row_tokens: T, tokens of a row.
      batch_rows: rows of one optimiser step.
      micro_rows: rows of one forward and backward pass.
      held_out: share of the texts kept for measuring.
      seed: of the order of rows.
    """

    answers: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    separator: str = ""
    row_tokens: int = 256
    batch_rows: int = 8
    micro_rows: int = 8
    held_out: float = 0.02
    seed: int = 0

    def __post_init__(self):
        check_rows(self)
        for name in ("answers", "text"):
            value = getattr(self, name)
            paths = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, name, paths)

    def check_named(self) -> None:
        """Raises UserError if there is neither a folder nor a file."""
        if not self.answers and not self.text:
            raise UserError(
                "nothing to train on: give --data=FOLDER of generate_answers, or "
                "--text=FILE"
            )


@dataclasses.dataclass(frozen=True)
class ShapeConfig:
    """Of the drafter; what is 0 or None goes with the target.

    A draft model's sizes go with the target by half of them (`new_drafter`).

    Attributes:
      vocab: Vd, the commonest tokens of the training text are known; 0: all tokens.
      mlp_dim: of the layer, or of a draft model's layers.
      num_heads: of its attention.
      num_kv_heads: likewise.
      head_dim: likewise.
      embed_dim: of a draft model.
      num_layers: of a draft model.
      feature_layers: as of `EagleConfig`; none: outputs of layers 1, n/2 - 1 and n - 4
        for EAGLE-3 (what publishers call the inputs of layers 2, n/2 and n - 3).
      heads: K, of Medusa.
      blocks: of each Medusa head.
      reads_root: Medusa's heads also read the token that they go on from
        (`models.medusa`).
      shared_head: the head is the target's; else it is trained from a copy of it.
    """

    vocab: int = 0
    mlp_dim: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    embed_dim: int = 0
    num_layers: int = 1
    feature_layers: tuple[int, ...] | None = None
    heads: int = 4
    blocks: int = 1
    reads_root: bool = False
    shared_head: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name not in ("feature_layers", "reads_root", "shared_head"):
                low = 1 if field.name in ("num_layers", "heads", "blocks") else 0
                check_int(f"drafter.{field.name}", getattr(self, field.name), low)
        check_bool("drafter.reads_root", self.reads_root)
        check_bool("drafter.shared_head", self.shared_head)
        if self.feature_layers == ():
            object.__setattr__(self, "feature_layers", None)
        if self.feature_layers is not None:
            layers = check_layers("drafter.feature_layers", self.feature_layers)
            object.__setattr__(self, "feature_layers", layers)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised; see `training.head_losses`.

    Attributes:
      predictions: S, per row; Medusa has one per head at most. A draft model
        learns one and is measured on S.
      decay: weight of a prediction against the one before.
      token_weight: of the cross entropy.
      feature_weight: of the distance between an EAGLE-1 layer's output and the target's
        next row (smooth L1, 2401.15077).
    """

    predictions: int = 5
    decay: float = 0.8
    token_weight: float = 1.0
    feature_weight: float = 0.0

    def __post_init__(self):
        check_int("objective.predictions", self.predictions, 1)
        check_float("objective.decay", self.decay, 0, 1, open_low=True)
        check_float("objective.token_weight", self.token_weight, 0)
        check_float("objective.feature_weight", self.feature_weight, 0)


@dataclasses.dataclass(frozen=True)
class DrafterRun:
    """How a run is carried out; none of it changes the result, but for `dtype`.

    Attributes:
      output: folder for checkpoints, the curve and the exported drafter.
      save_minutes: between checkpoints.
      eval_every: steps between measurements on held-out text.
      eval_rows: held-out rows measured then, at most.
      stop_after: end the process after this many steps of it; 0: no limit.
      max_minutes: after this time the schedule's decay begins, however many steps it
        had to go, or the process ends if it has none; 0: no limit.
      progress: show a progress bar.
      export_dtype: of the exported drafter.
      dtype: of the computation; "": bfloat16 on accelerators, float32 on a CPU.
    """

    output: str = ""
    save_minutes: float = 5.0
    eval_every: int = 100
    eval_rows: int = 32
    stop_after: int = 0
    max_minutes: float = 0.0
    progress: bool = True
    export_dtype: str = "bfloat16"
    dtype: str = ""

    def __post_init__(self):
        for name in ("save_minutes", "max_minutes"):
            check_float(f"run.{name}", getattr(self, name), 0)
        for name, low in [("eval_every", 1), ("eval_rows", 1), ("stop_after", 0)]:
            check_int(f"run.{name}", getattr(self, name), low)
        if not self.output:
            raise UserError("no output folder: give --output=FOLDER")
        for name, allowed in [
            ("export_dtype", ("bfloat16", "float32")),
            ("dtype", ("", "bfloat16", "float32")),
        ]:
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"run.{name} must be bfloat16 or float32, got "
                    f"{getattr(self, name)!r}"
                )


@dataclasses.dataclass(frozen=True)
class DrafterTraining:
    """One training run of a drafter; the target stays as it is.

    Attributes:
      method: one of `METHODS`.
      target: path or name of the target's checkpoint.
      seed: of the initial parameters.
    """

    method: str
    target: str
    data: AnswersConfig
    run: DrafterRun
    drafter: ShapeConfig = ShapeConfig()
    objective: Objective = Objective()
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(
                f"method {self.method!r} is unknown; choose from {', '.join(METHODS)}"
            )
        if not self.target:
            raise UserError("no target: give --target=CHECKPOINT")
        if self.method == "medusa":
            count = min(self.objective.predictions, self.drafter.heads)
            objective = dataclasses.replace(self.objective, predictions=count)
            object.__setattr__(self, "objective", objective)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share: all but `run`, paths and the steps."""
        values = dataclasses.asdict(self)
        del values["optimizer"]["steps"], values["run"], values["target"]
        del values["data"]["answers"], values["data"]["text"]
        return values


def build(values: Mapping[str, Any]) -> DrafterTraining:
    """Turns a nested mapping (a configuration file) into checked settings.

    Raises:
      UserError: an unknown key or a bad value, named.
    """
    values = dict(values)
    parts = {
        "data": AnswersConfig,
        "run": DrafterRun,
        "drafter": ShapeConfig,
        "objective": Objective,
        "optimizer": OptimizerConfig,
    }
    for name, cls in parts.items():
        values[name] = from_mapping(cls, values.get(name, {}), name)
    return from_mapping(DrafterTraining, values, "configuration")
