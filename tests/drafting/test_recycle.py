"""Token recycling on the device against dictionaries in plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from tests.drafting import host, streams
from treespec_jax.drafting.recycle import Recycle, RecycleOptions

COUNT = 4


def pair(scope: str):
    """A drafter's stream, and the model beside it."""
    drafter = Recycle.make(None, 1.0, RecycleOptions(COUNT, scope))
    stream = streams.Stream(drafter)
    start = stream.state.parts[0].rates
    return stream, host.Recycle(streams.B, COUNT, scope, start)


def check_tables(stream, model) -> None:
    """Every row that was learnt, and no other."""
    state = stream.state.parts[0]
    best, logits = np.asarray(state.best), np.asarray(state.logits)
    tables = model.tables[: len(best)]
    assert (logits[:, :, 0] > -np.inf).sum() == sum(map(len, tables))
    for index, table in enumerate(tables):
        for token, row in table.items():
            assert best[index, token].tolist() == row[0]
            assert logits[index, token].tolist() == row[1]
    np.testing.assert_allclose(state.rates.hits, model.rates.hits, rtol=1e-5)
    np.testing.assert_allclose(state.rates.tries, model.rates.tries, rtol=1e-5)


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("engine", ("chain:3", "regular:2x2", "dynamic:7@3")),
        ("request", ("dynamic:7@3",)),
    ],
)
def test_trees_and_tables_are_those_of_the_model(scope, names):
    stream, model = pair(scope)
    seen = streams.run(stream, model, names, steps=60)
    check_tables(stream, model)
    assert seen.doubtful < 0.2 * seen.trees, seen
    assert seen.nodes > 300 and seen.accepted > 50, seen
