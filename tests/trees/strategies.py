"""Random trees for property tests."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def level_order_parents(draw, largest=12):
    """Parents that never fall, each before its child: exactly level order."""
    parents = [-1]
    for node in range(1, draw(st.integers(1, largest))):
        parents.append(draw(st.integers(max(0, parents[-1]), node - 1)))
    return tuple(parents)
