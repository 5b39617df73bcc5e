"""Checkpoints of the Hugging Face Hub, through its client; free of jax.

The client (`huggingface_hub`) has its own cache, token, progress bars and variables
(HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT). It is imported on first
use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from treespec_jax.checkpoints.files import cause, read_json
from treespec_jax.checkpoints.foreign import ADAPTER, QUANTISERS, check_folder
from treespec_jax.checkpoints.safetensors_source import INDEX
from treespec_jax.checkpoints.tokenizers.settings import COMPANIONS
from treespec_jax.errors import UserError

_NAME = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@:\s]+))?(:(?P<file>[^:\s]+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Endings of files: a name that has one is a path that leads nowhere, no repository.
_FILES = (".gguf", ".bin", ".json", ".model", ".safetensors", ".jinja")
# What there is to know of a model besides its weights.
_SMALL = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer.model",
    ADAPTER,
    *QUANTISERS,
    *COMPANIONS,
)
# Of other libraries: parts for other tasks, and weights in a layout of their own.
_OTHERS = ["*/*", "consolidated*", "adapter_model*"]
# Seconds to wait for an answer before the cache has to do.
_PATIENCE = 10.0


def parse(text: str) -> HubName | None:
    """The repository that a text names, or None if it has not that form.

    Forms are `org/name`, `org/name@revision`, and either with `:file` behind it.
    """
    found = _NAME.fullmatch(text)
    if found is None or found["repository"].lower().endswith(_FILES):
        return None
    return HubName(**found.groupdict())


@dataclasses.dataclass(frozen=True)
class HubName:
    """A model of the hub.

    Attributes:
      repository: "org/name".
      revision: a branch, tag or commit; None: the main branch.
      file: of the repository, that holds all of the checkpoint (GGUF); None: a folder
        with safetensors does.
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    def __str__(self):
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}{f':{self.file}' if self.file else ''}"

    def fetch(self) -> Path:
        """The file; or the folder, with all but the weights, as the hub has it now.

        What is in the client's cache is not downloaded again, and does without a
        network.

        Raises:
          UserError: no such repository, revision or file; one that is gated, or
            private; nothing in the cache and no network; no room on the disk.
        """
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError

        with self._errors():
            if self.file is not None:
                path = huggingface_hub.hf_hub_download(
                    self.repository,
                    self.file,
                    revision=self.revision,
                    local_files_only=not self._reachable(),
                )
                return Path(path)
            if self.revision and _COMMIT.fullmatch(self.revision):
                # It never changes.
                with contextlib.suppress(LocalEntryNotFoundError):
                    return self._snapshot(self.revision, _SMALL, local_files_only=True)
            return self._snapshot(self.revision, _SMALL)

    def check(self, folder: Path) -> None:
        """Raises UserError if the repository, fetched to `folder`, is no model."""
        check_folder(folder)
        if not (folder / "config.json").is_file():
            raise UserError(self._lacking("config.json"))

    def fetch_weights(self, folder: Path) -> None:
        """Downloads the weights that belong to what `fetch` brought, if it must.

        Raises:
          UserError: the repository has no safetensors; and as `fetch` does.
        """
        wanted = ["model.safetensors"]
        if (folder / INDEX).is_file():
            shards = read_json(folder / INDEX).get("weight_map")
            shards = shards.values() if isinstance(shards, Mapping) else ()
            wanted = sorted({name for name in shards if isinstance(name, str)})
        if all((folder / name).is_file() for name in wanted):
            return
        patterns = wanted if (folder / INDEX).is_file() else ["*.safetensors"]
        with self._errors():
            # Of the commit, for the branch may have moved on.
            self._snapshot(
                folder.name, patterns, local_files_only=not self._reachable()
            )
        if not any(folder.glob("*.safetensors")):
            raise UserError(self._lacking("*.safetensors"))

    def _snapshot(
        self, revision: str | None, patterns: Sequence[str], **options
    ) -> Path:
        import huggingface_hub

        path = huggingface_hub.snapshot_download(
            self.repository,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=_OTHERS,
            **options,
        )
        return Path(path)

    def _reachable(self) -> bool:
        """Whether the hub answers, be it with a refusal.

        Where it does not, some calls of the client try for half a minute.
        """
        from huggingface_hub import HfApi, errors

        try:
            HfApi().model_info(
                self.repository, revision=self.revision, timeout=_PATIENCE
            )
        except (errors.HfHubHTTPError, errors.HFValidationError):
            return True
        except Exception:
            # Which ones depends on the client of HTTP that its version uses.
            return False
        return True

    def _lacking(self, what: str) -> str:
        """What to say where a file is missing that every model has."""
        if not self._reachable():
            return self._unreachable()
        ggufs = [name for name in self._files() if name.endswith(".gguf")]
        if ggufs:
            shown = ", ".join(ggufs[:8]) + (", …" if len(ggufs) > 8 else "")
            return f"{self} holds GGUF files: name one, {self}:FILE, of {shown}"
        return f"{self} holds no {what}; give a repository with safetensors or GGUF"

    def _files(self) -> list[str]:
        """Names of all files of the repository."""
        from huggingface_hub import HfApi

        with self._errors():
            return HfApi().list_repo_files(self.repository, revision=self.revision)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what the client raises into one line, and keeps it from logging more.

        Raises:
          UserError: for any exception.
        """
        from huggingface_hub import constants, errors

        log = logging.getLogger("huggingface_hub")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            yield
        except errors.GatedRepoError:
            raise UserError(
                f"{self.repository} is gated: accept its terms on its page of the hub, "
                "then log in (hf auth login, or HF_TOKEN)"
            ) from None
        except errors.RepositoryNotFoundError:
            raise UserError(
                f"{self} is no file or folder, and no repository of the Hugging Face "
                "Hub that you may read; check the name, or log in (hf auth login) if "
                "it is private"
            ) from None
        except errors.RevisionNotFoundError:
            raise UserError(
                f"{self.repository} has no revision {self.revision!r}; check the "
                "branch, tag or commit"
            ) from None
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
            raise UserError(self._unreachable()) from None
        except errors.EntryNotFoundError:
            raise UserError(
                f"{self.repository} has no file {self.file!r} in revision "
                f"{self.revision or 'main'}; check the name"
            ) from None
        except errors.HFValidationError as error:
            raise UserError(f"no checkpoint at {self}; {cause(error)}") from None
        except Exception as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                reason = f"{os.strerror(errno.ENOSPC)} in {constants.HF_HUB_CACHE}"
            else:
                reason = cause(error)
            raise UserError(
                f"{self} cannot be downloaded: {reason}; the same command goes on from "
                "here once that is mended"
            ) from None
        finally:
            log.setLevel(level)

    def _unreachable(self) -> str:
        from huggingface_hub import constants

        why = "the hub cannot be reached"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        return (
            f"no file or folder is called {self}, so it is taken for a repository of "
            f"the Hugging Face Hub: {why}, and the hub's cache "
            f"{constants.HF_HUB_CACHE} does not hold all of it; check the path, or "
            "connect once to download it"
        )
