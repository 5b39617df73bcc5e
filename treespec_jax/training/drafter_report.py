"""What a drafter's training cost and what it brought, as a file and as a table."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from treespec_jax.training.drafter_trainer import Measured


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a run so far.

    Attributes:
      parameters: number that is trained.
      share: of the target's number.
      steps: of the optimiser.
      tokens: seen, each pass over the text counted.
      flops: a rule of thumb, see `Trainer.flops_per_token`.
      seconds: of all processes of the run, measurements included.
    """

    parameters: int
    share: float
    steps: int
    tokens: int
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Training cost against speed-up, as papers on drafters tell it.

    Attributes:
      method: of `drafter_settings.METHODS`.
      target: path or name.
      cost: of the run.
      before: of the untrained drafter; plain decoding makes 1 token per step.
      after: of the exported one.
      best_step: whose parameters are exported.
    """

    method: str
    target: str
    cost: Cost
    before: Measured
    after: Measured
    best_step: int

    def write(self, path: Path) -> None:
        """Writes it as JSON, whole or not."""
        partial = path.with_name(path.name + ".partial")
        text = json.dumps(dataclasses.asdict(self), indent=2)
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)

    def lines(self) -> list[str]:
        """The table, for people."""
        cost, before, after = self.cost, self.before, self.after
        rows = [("held-out loss, nats per prediction", before.loss, after.loss)]
        rows += [
            (f"tokens per step, {name}", before.tokens_per_step[name], value)
            for name, value in after.tokens_per_step.items()
        ]
        width = max(len(name) for name, *_ in rows)
        return [
            f"{self.method} for {self.target}, of step {self.best_step}",
            f"{cost.parameters:,} parameters, {cost.share:.1%} of the target's",
            f"{cost.tokens:,} tokens in {cost.steps:,} steps, {cost.flops:.2g} FLOPs, "
            f"{cost.seconds:.0f} s",
            f"{'on held-out text':{width}}  untrained  trained",
            *(f"{name:{width}}  {old:9.3f}  {new:7.3f}" for name, old, new in rows),
        ]
