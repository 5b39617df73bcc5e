"""A bar on stderr: how many texts of a call are done, and tokens per second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import tqdm

from treespec_jax.engine.request import Request


class Progress(contextlib.AbstractContextManager):
    """Shows how far some requests are.

    Example:

      with Progress(requests, shown=True) as progress:
          while not call.ended:
              call.wait()
              progress.show()

    Args:
      requests: of one call.
      shown: whether anything is.
    """

    def __init__(self, requests: Sequence[Request], shown: bool):
        self._requests, self._shown = requests, shown
        self._bar: tqdm.tqdm | None = None

    def __enter__(self) -> Progress:
        if self._shown:
            self._bar = tqdm.tqdm(total=len(self._requests), unit="text")
            self._began = time.perf_counter()
        return self

    def __exit__(self, *raised) -> None:
        # A call may have ended before anybody waited for it.
        self.show()
        if self._bar is not None:
            self._bar.close()

    def show(self) -> None:
        """Brings the bar up to date."""
        bar = self._bar
        if bar is None:
            return
        tokens = sum(len(request.tokens) for request in self._requests)
        seconds = time.perf_counter() - self._began
        bar.set_postfix_str(f"{tokens / max(seconds, 1e-9):.1f} tok/s", refresh=False)
        done = sum(request.finish_reason is not None for request in self._requests)
        bar.update(done - bar.n)
        bar.refresh()
