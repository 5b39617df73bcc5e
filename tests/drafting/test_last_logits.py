"""Runners-up on the device against lists in plain Python."""

from __future__ import annotations

import numpy as np

from tests.drafting import host, streams
from treespec_jax.drafting.last_logits import LastLogitsDrafter, LastLogitsOptions

COUNT = 4


def test_trees_and_rates_are_those_of_the_model():
    drafter = LastLogitsDrafter.make(None, 1.0, LastLogitsOptions(COUNT))
    stream = streams.Stream(drafter)
    start = stream.state.parts[0]
    model = host.LastLogits(streams.B, COUNT, streams.DEPTH, start.worth, start.rates)
    seen = streams.run(stream, model, ("dynamic:7@3", "none"), steps=60)
    state = stream.state.parts[0]
    for ours, theirs in ((state.worth, model.worth), (state.rates, model.rates)):
        np.testing.assert_allclose(ours.hits, theirs.hits, rtol=1e-5)
        np.testing.assert_allclose(ours.tries, theirs.tries, rtol=1e-5)
    assert seen.doubtful < 0.2 * seen.trees, seen
    assert seen.nodes > 300 and seen.accepted > 50, seen
