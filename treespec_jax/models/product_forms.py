"""How many rows a product takes at once: a table per weight type, measured or built in.

On a CPU the cost of a product does not grow evenly with its rows: libraries change
their method at some counts. `blocks` pads rows and cuts them into blocks accordingly.
"""

from __future__ import annotations

import numpy as np

# Weight type -> milliseconds by row count, of no machine in particular. On a CPU 5 to
# 7 float32 rows cost a fifth more than 8, 9 to 15 up to 1.4 times 16, and 17 to 31 as
# much as 32; one bfloat16 or int8 row goes to a loop that takes ten times as long as
# the product of two.
_BUILT_IN = {
    "float32": {1: 1.0, 2: 1.3, 3: 1.35, 4: 1.4, 8: 1.6, 16: 1.9, 32: 2.9},
    "bfloat16": {2: 1.0, 4: 1.0, 8: 1.0, 16: 1.1, 32: 2.2},
    "int8": {2: 1.0, 4: 1.0, 8: 1.1, 16: 1.4, 32: 2.8},
}
_tables: dict[str, dict[int, float]] = {k: dict(v) for k, v in _BUILT_IN.items()}


def blocks(rows: int, dtype) -> tuple[int, ...]:
    """Sizes of the blocks that a product of some rows is cut into.

    Their sum is at least `rows`; what is over in the last one is padding.

    Args:
      rows: R.
      dtype: of the weights.
    """
    table = _tables.get(np.dtype(dtype).name, {})
    large = [(cost, size) for size, cost in table.items() if size >= rows]
    return (min(large)[1],) if large else (rows,)
