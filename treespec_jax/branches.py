"""How the program decides between two ways, by platform; the one place that knows.

On a CPU a conditional inside a step costs nothing, and one program serves all requests.
On a GPU XLA reads the predicate of every conditional and of every inner loop on the
host, and the device waits meanwhile. On a TPU it lays out anew what the sides of a
conditional read, and columns of logits, in rows of 128 lanes, then take up to sixteen
times the memory and its bandwidth. There the host decides before a dispatch what it
knows of all slots (`Known`), which makes programs of their own, each compiled when it
is first needed; and what only the device knows is computed both ways or without a loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# As `jax.Device.platform` says of those whose programs are straight; of a GPU also the
# names that programs are lowered for.
STRAIGHT = ("gpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of all slots of a dispatch when its program is compiled.

    Attributes:
      straight: whether the program must have no conditional and no inner loop.
      all_greedy: whether every slot is greedy; None: the program finds out, as of the
        others.
      any_greedy: whether some slot may be.
      truncated: whether some slot that samples has top-k or top-p.
      logprobs: whether somebody wants log probabilities.
    """

    straight: bool = False
    all_greedy: bool | None = None
    any_greedy: bool | None = None
    truncated: bool | None = None
    logprobs: bool | None = None


NOTHING = Known()


def branch(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]):
    """`then()` or `otherwise()`.

    Args:
      condition: a bool that is known already, or bool [], on the device.
      then: a function of nothing; its results have the shapes of the other's.
      otherwise: likewise.
    """
    if isinstance(condition, bool):
        return then() if condition else otherwise()
    return lax.cond(condition, then, otherwise)


def on_gpu(straight: Callable, otherwise: Callable, *args: Any):
    """What one of two functions makes of `args`: the first where a GPU will run it."""
    return lax.platform_dependent(
        *args, cuda=straight, rocm=straight, default=otherwise
    )


def on_cpu(there: Callable, otherwise: Callable, *args: Any):
    """What one of two functions makes of `args`: the first where a CPU will run it."""
    return lax.platform_dependent(*args, cpu=there, default=otherwise)


def is_straight(device: jax.Device | None) -> bool:
    """Whether programs of a device have no conditionals; None: the default device."""
    platform = jax.default_backend() if device is None else device.platform
    return platform in STRAIGHT
