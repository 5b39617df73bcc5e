"""The TPU compiler here too."""

from tests.aot.conftest import tpu_compiler

__all__ = ["tpu_compiler"]
