"""Token ids of the bundled pair are those of the golden file.

`tests/golden/make_behaviour.py` compares all of the file, which takes half an hour.
"""

from __future__ import annotations

import json

import pytest

from tests.golden import make_behaviour as golden

# Name of a case, and how many prompts are decoded together.
CASES = {
    "token allotted:7@4": 5,
    "terminal chain:3": 5,
}


@pytest.fixture(scope="module")
def pair():
    return golden.load_pair()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_recorded(name, pair):
    batch = CASES[name]
    (case,) = (case for case in golden.cases() if case.name == name)
    wanted = json.loads(golden.FILE.read_text())[f"{name} batch {batch}"]
    found = golden.run(case, pair, batch, names=("greedy", "mixed"))
    for kind, tokens in found.items():
        assert tokens == wanted[kind]
