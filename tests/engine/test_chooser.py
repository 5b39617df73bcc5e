"""Which shape a dispatch grows, by speeds that are scripted."""

from __future__ import annotations

import dataclasses

import pytest

from treespec_jax.engine.chooser import (
    COMPARISONS,
    ENOUGH,
    MEMORY,
    PRIOR_COST,
    RARELY,
    SOON,
    TRIAL_STEPS,
    WORTH_COMPILING,
    Choice,
    Chooser,
)
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import ROOT_ONLY

TREE = shapes.parse("dynamic:7@3")
STEPS, EVERY = 8, 8


@dataclasses.dataclass
class Script:
    """An engine of one slot whose steps take as long as they are told.

    The next dispatch starts before the results of the last one are read.

    Attributes:
      tree: plain steps that a tree's step takes, and its tokens.
      compiled: whether no dispatch has to be compiled first.
    """

    tree: tuple[float, float]
    compiled: bool = True

    def __post_init__(self):
        self.chooser = Chooser((TREE, ROOT_ONLY), EVERY)
        self.chooser.compiled = self.compiled
        self.ran: list[Choice] = []
        self._flying, self._known = [], set()

    def dispatch(self, count: int = 1) -> list[Choice]:
        """Starts some, and lands all but the last one."""
        for _ in range(count):
            choice = self.chooser.choose(None)
            self.chooser.started(choice)
            self._flying.append(choice)
            self.ran.append(choice)
            if len(self._flying) > 1:
                self._land(self._flying.pop(0))
        return self.ran[-count:]

    def begin_text(self) -> None:
        """Lands all, as where nothing is planned ahead, and begins a text."""
        while self._flying:
            self._land(self._flying.pop(0))
        self.chooser.begin_text()

    def _land(self, choice: Choice) -> None:
        cost, tokens = self.tree if choice.shape == TREE else (1.0, 1)
        seconds = 0.03 * cost * steps_of(choice)
        if choice.shape not in self._known:
            # Whatever a first run takes besides.
            seconds *= 50
        self._known.add(choice.shape)
        emitted = int(tokens * steps_of(choice))
        self.chooser.record(choice.shape, steps_of(choice), emitted, 1, seconds)
        if choice.rehearse:
            self.chooser.rehearsed(self.tree[1])

    def share(self, count: int) -> float:
        """Of the next steps, those that grow a tree."""
        return share_of(self.dispatch(count))


def steps_of(choice: Choice) -> int:
    return STEPS if choice.max_steps is None else choice.max_steps


def share_of(ran: list[Choice]) -> float:
    trees = sum(steps_of(choice) for choice in ran if choice.shape == TREE)
    return trees / sum(map(steps_of, ran))


def test_one_shape_leaves_no_choice():
    chooser = Chooser((TREE,))
    for _ in range(200):
        assert chooser.choose(5) == Choice(TREE, 5)
        chooser.started(Choice(TREE, 5))
        chooser.record(TREE, 5, 5, 1, 9.0)


def test_a_tree_that_loses_gives_way_to_plain_decoding():
    script = Script(tree=(1.7, 1.1))
    script.dispatch(RARELY)
    assert script.share(4 * RARELY) < 0.003
    assert script.chooser.cost(TREE) == pytest.approx(1.7)
    assert script.chooser.expected(TREE) == pytest.approx(1.1)


def test_a_tree_that_gains_is_used_and_plain_decoding_rarely_tried():
    script = Script(tree=(1.5, 2.0))
    script.dispatch(10 * SOON)
    ran = script.dispatch(10 * RARELY)
    trials = [steps_of(choice) for choice in ran if choice.shape == ROOT_ONLY]
    # They are tried, for a few steps each.
    assert 5 <= len(trials) <= 12 and set(trials) == {TRIAL_STEPS}


def test_a_tree_that_brings_much_is_not_questioned():
    script = Script(tree=(9.0, ENOUGH + 0.5))
    script.dispatch(3)
    assert script.share(20 * RARELY) == 1


def test_texts_with_nothing_to_copy_take_no_trials_of_their_own():
    script = Script(tree=(1.7, 1.0))
    for _ in range(60):
        script.begin_text()
        script.dispatch(24)
    timing = sum(choice.shape == TREE for choice in script.ran)
    assert timing <= 10 and share_of(script.ran) < 0.003


def test_a_reset_forgets_texts_and_not_times():
    script = Script(tree=(1.7, 1.0))
    script.dispatch(2 * RARELY)
    script.chooser.reset()
    assert script.chooser.cost(TREE) == pytest.approx(1.7)
    ran = script.dispatch(RARELY // 2)
    # Nothing is known of texts: two steps show what they are like.
    assert [c for c in ran if c.shape == TREE] == [ran[0]]
    assert steps_of(ran[0]) == TRIAL_STEPS
    assert Chooser((TREE, ROOT_ONLY)).cost(TREE) == PRIOR_COST


def test_rehearsals_bring_the_tree_back_within_a_text():
    script = Script(tree=(1.5, 1.1))
    script.dispatch(2 * RARELY)
    script.tree = (1.5, 3.0)
    script.dispatch(MEMORY)
    assert script.share(4 * RARELY) > 0.99
    script.tree = (1.5, 1.0)
    script.dispatch(MEMORY)
    assert script.share(4 * RARELY) < 0.01


def test_a_new_text_that_a_tree_fits_gets_it_after_a_few_tokens():
    """Whatever the last text was like; and the next one loses it as quickly."""
    script = Script(tree=(1.5, 1.1))
    script.dispatch(2 * RARELY)
    script.tree = (1.5, 3.0)
    script.begin_text()
    ran = script.dispatch(4)
    assert [c.shape for c in ran] == [ROOT_ONLY, ROOT_ONLY, TREE, TREE]
    assert [steps_of(c) for c in ran[:2]] == [TRIAL_STEPS] * 2
    script.tree = (1.5, 1.0)
    script.begin_text()
    ran = script.dispatch(6)
    assert steps_of(ran[0]) == TRIAL_STEPS
    assert {c.shape for c in ran[3:]} == {ROOT_ONLY}


def test_texts_that_begin_all_the_time_leave_most_steps_to_the_quicker_shape():
    for tree, least, highest in (((1.5, 1.1), 0.0, 0.02), ((1.5, 2.0), 0.95, 1.0)):
        script = Script(tree=tree)
        script.dispatch(RARELY)
        ran = []
        for _ in range(4 * RARELY):
            script.begin_text()
            ran += script.dispatch()
        assert least <= share_of(ran) <= highest


@pytest.mark.parametrize("steps", [1, 3, STEPS])
def test_rehearsals_come_once_in_so_many_plain_steps(steps):
    chooser = Chooser((TREE, ROOT_ONLY), EVERY)
    chooser.compiled = True
    plain = rehearsals = 0
    for _ in range(400):
        choice = chooser.choose(steps)
        assert choice.max_steps <= steps
        chooser.started(choice)
        seconds = steps_of(choice) * (2.0 if choice.shape == TREE else 1.0)
        chooser.record(choice.shape, steps_of(choice), steps_of(choice), 1, seconds)
        assert not (choice.rehearse and choice.shape == TREE)
        plain += steps_of(choice) * (choice.shape == ROOT_ONLY)
        rehearsals += choice.rehearse
    # As often as dispatches allow.
    period = -(-EVERY // steps) * steps
    assert rehearsals == pytest.approx(plain / period, abs=2)


def test_what_a_caller_allows_is_an_upper_bound():
    script = Script(tree=(1.5, 2.0))
    for _ in range(4 * RARELY):
        assert script.chooser.choose(1).max_steps == 1
        script.dispatch()


def test_a_choice_without_a_dispatch_changes_nothing():
    """Where the next dispatch cannot be planned ahead, every second choice is idle."""
    one, other = Script(tree=(1.5, 2.0)), Script(tree=(1.5, 2.0))
    for _ in range(6 * RARELY):
        one.dispatch()
        other.dispatch()
        other.chooser.choose(None)
    assert one.ran == other.ran


def test_times_that_differ_now_and_then_do_not_count():
    """Whatever else the machine does, less often than every second time."""
    chooser = Chooser((TREE, ROOT_ONLY))
    chooser.compiled = True
    chooser.record(TREE, STEPS, STEPS, 1, 9.0)
    for number in range(2 * COMPARISONS):
        chooser.record(ROOT_ONLY, STEPS, STEPS, 1, STEPS * 1.0)
        chooser.record(TREE, 2, 2, 1, 2 * (1.6 if number % 3 else 40.0))
    assert chooser.cost(TREE) == pytest.approx(1.6)


def test_time_that_something_else_took_is_not_compared():
    """A program compiled, or dispatches of other sizes."""
    chooser = Chooser((TREE, ROOT_ONLY))
    for shape in (TREE, ROOT_ONLY, TREE, ROOT_ONLY):
        chooser.record(shape, STEPS, STEPS, 1, None)
    chooser.record(TREE, STEPS, STEPS, 1, 5.0)
    chooser.record(ROOT_ONLY, STEPS, 8 * STEPS, 8, 1.0)
    chooser.record(ROOT_ONLY, 0, 0, 8, 1.0)
    chooser.record(TREE, STEPS, 8 * STEPS, 8, 9.0)
    assert chooser.cost(TREE) == PRIOR_COST


def test_a_batch_has_times_of_its_own():
    chooser = Chooser((TREE, ROOT_ONLY))
    for _ in range(2):
        for slots, cost in ((1, 1.2), (8, 4.0)):
            chooser.record(ROOT_ONLY, STEPS, slots * STEPS, slots, 1.0)
            chooser.record(TREE, STEPS, slots * STEPS, slots, cost)
            chooser.record(ROOT_ONLY, STEPS, slots * STEPS, slots, 1.0)
    assert chooser.cost(TREE) == pytest.approx(4.0)
    chooser.record(ROOT_ONLY, STEPS, STEPS, 1, 1.0)
    assert chooser.cost(TREE) == pytest.approx(1.2)


def test_a_short_run_compiles_nothing_but_the_tree():
    script = Script(tree=(2.0, 1.0), compiled=False)
    ran = script.dispatch(WORTH_COMPILING // STEPS)
    assert ran == [Choice(TREE, None)] * len(ran)
    assert ROOT_ONLY in {choice.shape for choice in script.dispatch(SOON)}
