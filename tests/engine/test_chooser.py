"""Which shape a dispatch grows, by speeds that are scripted."""

from __future__ import annotations

import dataclasses

from treespec_jax.engine.chooser import (
    ENOUGH,
    FIRST_LOOK,
    RARELY,
    SOON,
    TRIAL_STEPS,
    WORTH_COMPILING,
    Chooser,
)
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import ROOT_ONLY

TREE = shapes.parse("dynamic:7@3")
STEPS = 8


@dataclasses.dataclass
class Script:
    """An engine of one slot whose steps take as long as they are told.

    Attributes:
      tree: seconds of a tree's step, and tokens.
      plain: seconds of plain decoding's step.
      compiles: whether the first dispatch of a shape takes a minute more.
    """

    tree: tuple[float, float]
    plain: float = 1.0
    compiles: bool = True

    def __post_init__(self):
        self.chooser = Chooser((TREE, ROOT_ONLY))
        self.chooser.compiled = True
        self.ran, self._known = [], set()

    def dispatch(self, count: int = 1) -> list[tuple]:
        """Runs some; returns shape and steps of each."""
        for _ in range(count):
            shape, steps = self.chooser.choose(None)
            self.chooser.started(shape)
            steps = STEPS if steps is None else steps
            seconds, tokens = self.tree if shape == TREE else (self.plain, 1)
            seconds *= steps
            if self.compiles and shape not in self._known:
                seconds = None
            self._known.add(shape)
            self.chooser.record(shape, steps, int(tokens * steps), 1, seconds)
            self.ran.append((shape, steps))
        return self.ran[-count:]

    def share(self, count: int) -> float:
        """Of the next steps, those that grow a tree."""
        ran = self.dispatch(count)
        return sum(s for shape, s in ran if shape == TREE) / sum(s for _, s in ran)


def test_one_shape_leaves_no_choice():
    chooser = Chooser((TREE,))
    for _ in range(200):
        assert chooser.choose(5) == (TREE, 5)
        chooser.started(TREE)
        chooser.record(TREE, 5, 5, 1, 9.0)


def test_a_tree_that_loses_gives_way_to_plain_decoding():
    script = Script(tree=(1.5, 1.1))
    assert script.share(FIRST_LOOK) == 1
    script.dispatch(10 * SOON)
    assert script.share(10 * RARELY) < 0.01


def test_a_tree_that_gains_is_used_and_plain_decoding_rarely_tried():
    script = Script(tree=(1.5, 2.0))
    script.dispatch(10 * SOON)
    ran = script.dispatch(10 * RARELY)
    trials = [steps for shape, steps in ran if shape == ROOT_ONLY]
    # They are tried, for a few steps each.
    assert 5 <= len(trials) <= 12 and set(trials) == {TRIAL_STEPS}


def test_a_tree_that_brings_much_is_not_questioned():
    script = Script(tree=(9.0, ENOUGH + 0.5))
    assert script.share(20 * RARELY) == 1


def test_it_comes_back_to_a_tree_that_gains_again():
    script = Script(tree=(1.5, 1.1))
    script.dispatch(20 * RARELY)
    script.tree = (1.5, 3.0)
    script.dispatch(8 * RARELY)
    assert script.share(4 * RARELY) > 0.99
    script.tree = (1.5, 1.0)
    script.dispatch(8 * RARELY)
    assert script.share(4 * RARELY) < 0.01


def test_it_looks_again_soon_after_a_text_begins():
    script = Script(tree=(1.5, 1.1))
    script.dispatch(10 * RARELY)
    script.dispatch(RARELY + 1)
    # Put the next trial as far away as it can be.
    while script.dispatch()[0][0] == ROOT_ONLY:
        pass
    assert script.share(SOON) == 0
    script.chooser.begin_text()
    assert (TREE, TRIAL_STEPS) in script.dispatch(SOON)
    assert (TREE, TRIAL_STEPS) in script.dispatch(3 * SOON)


def test_a_new_text_that_a_tree_fits_gets_it_at_once():
    """Whatever the last text was like; and the next one may lose it again."""
    script = Script(tree=(1.5, 1.1))
    script.dispatch(10 * RARELY)
    script.tree = (1.5, 2.0)
    script.chooser.begin_text()
    script.dispatch(3 * SOON)
    assert script.share(4 * RARELY) > 0.98
    script.tree = (1.5, 1.2)
    script.chooser.begin_text()
    script.dispatch(3 * SOON)
    assert script.share(4 * RARELY) < 0.02


def test_texts_that_begin_all_the_time_leave_most_steps_to_the_quicker_shape():
    for tree, least in (((1.5, 1.1), 0.0), ((1.5, 2.0), 0.75)):
        script = Script(tree=tree)
        script.dispatch(10 * RARELY)
        ran = []
        for _ in range(4 * RARELY):
            script.chooser.begin_text()
            ran += script.dispatch()
        steps = sum(steps for _, steps in ran)
        share = sum(s for shape, s in ran if shape == TREE) / steps
        assert least <= share <= least + 0.25


def test_what_a_caller_allows_is_an_upper_bound():
    script = Script(tree=(1.5, 2.0))
    for _ in range(4 * RARELY):
        assert script.chooser.choose(1)[1] == 1
        script.dispatch()


def test_a_choice_without_a_dispatch_costs_no_trial():
    """Where the next dispatch cannot be planned ahead, every second choice is idle."""
    one, other = Script(tree=(1.5, 2.0)), Script(tree=(1.5, 2.0))
    for _ in range(6 * RARELY):
        one.dispatch()
        other.dispatch()
        other.chooser.choose(None)
    assert one.ran == other.ran


def test_time_that_something_else_took_is_not_counted():
    """A program compiled, while a tree that gains was under way."""
    script = Script(tree=(1.0, 2.0))
    script.dispatch(10 * SOON)
    for _ in range(20):
        script.chooser.record(TREE, STEPS, STEPS, 1, None)
    assert script.share(RARELY // 2) > 0.9


def test_a_short_run_compiles_nothing_for_a_trial():
    script = Script(tree=(2.0, 1.0))
    script.chooser.compiled = False
    ran = script.dispatch(WORTH_COMPILING // STEPS)
    assert {shape for shape, _ in ran} == {TREE}
    assert ROOT_ONLY in {shape for shape, _ in script.dispatch(SOON + 1)}
