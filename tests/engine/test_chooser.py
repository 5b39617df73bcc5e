"""Which shape a dispatch grows, by speeds and acceptance that are scripted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from treespec_jax.config import SamplingParams
from treespec_jax.engine.chooser import (
    CREDIT,
    RARELY,
    SHARE,
    SOON,
    START,
    WORTH_COMPILING,
    WORTH_TREES,
    Chooser,
)
from treespec_jax.engine.costs import (
    COMPARISONS,
    REHEARSAL,
    CostCurve,
    Costs,
    Known,
    Load,
    usual_curve,
)
from treespec_jax.engine.expectation import TURNS
from treespec_jax.engine.request import Request
from treespec_jax.engine.timing import Choice
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import ROOT_ONLY

LADDER = shapes.parse("auto:7@4+3@3+15@5+31@7").shapes
TREE = LADDER[0]
PAIR = (TREE, ROOT_ONLY)
STEPS, ONE = 8, Load.of(1, 0)
# Of a rehearsal, in plain steps.
PRICE = 0.15


def request(**settings) -> Request:
    return Request([1], SamplingParams(**settings))


def ladder(*steps):
    """Cost and tokens of a step by shape."""
    return dict(zip(LADDER[:-1], steps, strict=True))


def chooser(ladder=PAIR, known: Known | None = None) -> Chooser:
    return Chooser(ladder, Costs(usual_curve(True, False), 1, known), False, STEPS)


def ran(chooser, shape, load, seconds, steps=STEPS) -> None:
    """A dispatch of nobody's text."""
    chooser.record(Choice(shape, steps), [], steps, load, seconds)


@dataclasses.dataclass
class Script:
    """An engine of some texts whose steps take as long as they are told.

    The next dispatch starts before the results of the last one are read.

    Attributes:
      steps: plain steps that a step of each tree takes, and its tokens.
      ready: programs that are compiled; all by default.
      texts: how many.
    """

    steps: dict
    ready: set | None = None
    texts: int = 1
    known: Known | None = None

    def __post_init__(self):
        self.ladder = (*self.steps, ROOT_ONLY)
        self.chooser = chooser(self.ladder, self.known)
        if self.ready is None:
            self.ready = {*self.ladder, REHEARSAL}
        self.requests = [request() for _ in range(self.texts)]
        self.ran: list[Choice] = []
        self._flying, self._known = [], set()

    def dispatch(self, count: int = 1) -> list[Choice]:
        """Starts some, and lands all but the last one."""
        for _ in range(count):
            choice = self.chooser.choose(None, self.requests, self.ready, self._flying)
            self.chooser.started(choice, self.requests)
            self._flying.append(choice)
            self.ran.append(choice)
            if len(self._flying) > 1:
                self._land(self._flying.pop(0))
        return self.ran[-count:]

    def begin_text(self) -> None:
        """Lands all, as where nothing is planned ahead, and begins a text."""
        while self._flying:
            self._land(self._flying.pop(0))
        self.requests = [*self.requests[1:], request()]

    def _land(self, choice: Choice) -> None:
        steps, load = steps_of(choice), self.chooser.load(self.requests)
        cost, _ = (self.steps | {ROOT_ONLY: (1.0, 1)})[choice.shape]
        seconds = 0.03 * (cost * steps + PRICE * choice.rehearse)
        if choice.shape not in self._known:
            # Whatever a first run takes besides.
            seconds *= 50
        self._known.add(choice.shape)
        tokens = [tokens for _, tokens in self.steps.values()]
        # What is rehearsed is the first shape.
        tokens = np.array([*tokens, 1.0, min(2.0, tokens[0]), tokens[0]])
        told = np.tile(tokens, (steps, 1))
        if choice.shape == ROOT_ONLY:
            told = np.ones_like(told)
        observed = [(one, told) for one in self.requests]
        self.chooser.record(choice, observed, steps, load, seconds)
        if choice.rehearse:
            self.chooser.rehearsed([(one, tokens) for one in self.requests])

    def share(self, count: int, shape=TREE) -> float:
        """Of the next steps, those that grow a tree."""
        return share_of(self.dispatch(count), shape)


def steps_of(choice: Choice) -> int:
    return STEPS if choice.max_steps is None else choice.max_steps


def share_of(ran: list[Choice], shape=TREE) -> float:
    trees = sum(steps_of(choice) for choice in ran if choice.shape == shape)
    return trees / sum(map(steps_of, ran))


def test_one_shape_leaves_no_choice():
    alone, text = chooser((TREE,)), [request()]
    for _ in range(200):
        assert alone.choose(5, text, ()) == Choice(TREE, 5)
        alone.started(Choice(TREE, 5), text)
        ran(alone, TREE, ONE, 9.0)


def test_a_tree_that_loses_gives_way_to_plain_decoding():
    script = Script({TREE: (1.7, 1.1)})
    script.dispatch(RARELY)
    assert script.share(4 * RARELY) < 0.003
    cost = script.chooser.costs.relative(TREE, ONE)
    assert cost == pytest.approx(1.7, rel=0.1)
    assert script.chooser._tokens(script.requests)[0] == pytest.approx(1.1, abs=0.1)


def test_a_tree_that_gains_is_used_and_plain_decoding_rarely_tried():
    script = Script({TREE: (1.5, 2.0)})
    script.dispatch(10 * SOON)
    done = script.dispatch(10 * RARELY)
    # Some of them in pairs, for what the first one behind trees takes besides.
    assert 5 <= sum(choice.shape == ROOT_ONLY for choice in done) <= 14


def test_a_comparison_that_was_far_off_is_not_the_last():
    """Of an earlier run; no account would afford a tree of that cost."""
    known = Known(steps={(ONE, "dynamic:7@4"): [4.6]})
    script = Script({TREE: (1.6, 2.6)}, known=known)
    script.dispatch(4 * SOON)
    assert script.share(RARELY) > 0.9


def test_a_tree_that_brings_much_and_costs_more_gives_way():
    script = Script({TREE: (5.0, 4.0)})
    script.dispatch(RARELY)
    assert script.share(4 * RARELY) < 0.01


def test_texts_with_nothing_to_copy_take_no_trials_of_their_own():
    script = Script({TREE: (1.9, 1.0)})
    for _ in range(60):
        script.begin_text()
        script.dispatch(24)
    timing = sum(choice.shape == TREE for choice in script.ran)
    assert timing <= 10 and share_of(script.ran) < 0.003


@pytest.mark.parametrize(
    ("tokens", "best"),
    [
        ((1.1, 1.1, 1.1, 1.1), ROOT_ONLY),
        ((1.9, 1.8, 2.0, 2.05), LADDER[1]),
        ((2.4, 1.9, 2.7, 2.9), TREE),
        ((3.0, 2.2, 5.2, 5.6), LADDER[2]),
    ],
)
def test_the_best_shape_of_a_ladder_is_found(tokens, best):
    costs = (1.6, 1.3, 2.4, 4.2)
    script = Script(ladder(*zip(costs, tokens, strict=True)))
    script.dispatch(RARELY)
    assert script.share(2 * RARELY, best) > 0.97


def test_a_shape_that_cannot_win_is_neither_timed_nor_compiled():
    slow = ladder((1.6, 2.4), (1.3, 1.9), (2.4, 2.7), (9.0, 2.9))
    known = Known(steps={(ONE, "dynamic:31@7"): [9.0]})
    script = Script(slow, known=known)
    script.dispatch(2 * RARELY)
    assert LADDER[3] not in {choice.shape for choice in script.ran}
    assert LADDER[3] not in script.chooser.useful(ONE)
    assert {TREE, ROOT_ONLY} <= set(script.chooser.useful(ONE))


def test_a_reset_forgets_texts_and_not_times():
    script = Script({TREE: (1.7, 1.3)})
    script.dispatch(2 * RARELY)
    before = script.chooser.costs.relative(TREE, ONE)
    script.chooser.reset()
    assert before == script.chooser.costs.relative(TREE, ONE)
    assert before == pytest.approx(1.7, rel=0.1)
    again = script.chooser._tokens([request()])[0]
    assert again == chooser()._tokens([request()])[0] > 1.3


def test_rehearsals_bring_the_tree_back_within_a_text():
    script = Script({TREE: (1.5, 1.1)})
    script.dispatch(2 * RARELY)
    script.steps = {TREE: (1.5, 3.0)}
    script.dispatch(TURNS)
    assert script.share(4 * RARELY) > 0.99
    script.steps = {TREE: (1.5, 1.0)}
    script.dispatch(16)
    assert script.share(4 * RARELY) < 0.02


def test_a_new_text_that_a_tree_fits_gets_it_after_a_few_tokens():
    """Whatever the last text was like; and the next one loses it as quickly."""
    script = Script({TREE: (1.5, 1.1)})
    script.dispatch(2 * RARELY)
    script.steps = {TREE: (1.5, 3.0)}
    script.begin_text()
    done = script.dispatch(8)
    assert any(choice.rehearse for choice in done)
    assert script.share(16) > 0.8
    script.dispatch(20)
    script.steps = {TREE: (1.5, 1.0)}
    script.begin_text()
    script.dispatch(8)
    assert script.share(20) < 0.02


def test_texts_that_begin_all_the_time_leave_most_steps_to_the_quicker_shape():
    for tree, least, highest in (((1.5, 1.1), 0.0, 0.02), ((1.5, 2.0), 0.9, 1.0)):
        script = Script({TREE: tree})
        script.dispatch(RARELY)
        done = []
        for _ in range(4 * RARELY):
            script.begin_text()
            done += script.dispatch()
        assert least <= share_of(done) <= highest


def test_finding_out_takes_its_share_of_time_and_no_more():
    script = Script({TREE: (1.8, 1.0)})
    for _ in range(RARELY):
        script.dispatch(4)
        script.begin_text()
    plain = sum(steps_of(choice) for choice in script.ran)
    spent = sum(
        choice.rehearse * PRICE + (choice.shape == TREE) * 0.8 * steps_of(choice)
        for choice in script.ran
    )
    assert spent <= SHARE * plain + 2 * CREDIT
    assert spent > 0.5 * SHARE * plain
    assert not any(c.rehearse and c.shape != ROOT_ONLY for c in script.ran)


def test_the_price_of_rehearsals_is_found():
    one, rng = chooser(), np.random.default_rng(2)
    for number in range(200):
        choice = Choice(ROOT_ONLY, None, rehearse=number % 3 == 2)
        seconds = (STEPS + 0.6 * choice.rehearse) * np.exp(0.02 * rng.normal())
        one.record(choice, [], STEPS, ONE, seconds)
    assert one.costs.rehearsal(TREE, ONE) == pytest.approx(0.6, abs=0.12)
    # And no part of what a plain step takes.
    ran(one, TREE, ONE, 1.5 * STEPS)
    one.record(Choice(ROOT_ONLY, None, rehearse=True), [], STEPS, ONE, STEPS + 0.6)
    ran(one, TREE, ONE, 1.5 * STEPS)
    assert one.costs.relative(TREE, ONE) == pytest.approx(1.5, rel=0.03)


def test_first_rehearsals_of_a_process_do_not_make_them_dear():
    """The very first is left out; another program's, for sampled texts, is odd."""
    one, price = chooser(), 0.2
    for number in range(12):
        choice = Choice(ROOT_ONLY, None, rehearse=number % 3 == 2)
        odd = 5.0 if number in (2, 8) else 0.0
        time = STEPS + price * choice.rehearse + odd
        one.record(choice, [], STEPS, ONE, 0.03 * time)
        if number == 2:
            assert not one.costs.count(REHEARSAL, ONE)
    assert one.costs.count(REHEARSAL, ONE) == 2
    for _ in range(4):
        for rehearse in (False, True):
            choice = Choice(ROOT_ONLY, None, rehearse=rehearse)
            one.record(choice, [], STEPS, ONE, 0.03 * (STEPS + price * rehearse))
    assert one.costs.rehearsal(TREE, ONE) == pytest.approx(price, abs=0.02)


def test_a_loss_that_nobody_foresaw_ends_trees_for_a_while():
    """And whatever is under way counts before its results are known."""
    script = Script({TREE: (1.5, 3.0)})
    script.dispatch(RARELY)
    one, ready = script.chooser, script.ready
    one.reset()
    new = one.choose(None, [request()], ready)
    assert new.shape == TREE and 0 < new.risk <= START
    risky = Choice(TREE, None, risk=START)
    assert one.choose(None, [request()], ready, [risky]).shape == ROOT_ONLY
    nothing = [(request(), np.ones((2 * STEPS, 4)))]
    one.record(new, nothing, 2 * STEPS, ONE, None)
    assert one.choose(None, [request()], ready).shape == ROOT_ONLY
    # A tree that gains for certain needs no account.
    certain, tokens = request(), [3.0, 1.0, 2.0, 3.0]
    one._expectation.add(certain, TREE, np.tile(tokens, (4 * STEPS, 1)))
    assert one.choose(None, [certain], ready) == Choice(TREE, None)


def test_what_a_caller_allows_is_an_upper_bound():
    script = Script({TREE: (1.5, 2.0)})
    for _ in range(4 * RARELY):
        choice = script.chooser.choose(1, script.requests, script.ready)
        assert choice.max_steps == 1
        script.dispatch()


def test_a_choice_without_a_dispatch_changes_nothing():
    """Where the next dispatch cannot be planned ahead, every second choice is idle."""
    one, other = Script({TREE: (1.5, 2.0)}), Script({TREE: (1.5, 2.0)})
    for _ in range(6 * RARELY):
        one.dispatch()
        other.dispatch()
        other.chooser.choose(None, other.requests, other.ready)
    assert one.ran == other.ran


def test_times_that_differ_now_and_then_do_not_count():
    """Whatever else the machine does, less often than every second time."""
    one = chooser()
    ran(one, TREE, ONE, 9.0)
    for number in range(2 * COMPARISONS):
        ran(one, ROOT_ONLY, ONE, STEPS * 1.0)
        ran(one, TREE, ONE, 2 * (1.6 if number % 3 else 40.0), 2)
    assert one.costs.relative(TREE, ONE) == pytest.approx(1.6)


def test_time_that_something_else_took_is_not_compared():
    """A program compiled, or dispatches under other loads."""
    one = chooser()
    before = one.costs.relative(TREE, ONE)
    for shape in (TREE, ROOT_ONLY, TREE, ROOT_ONLY):
        ran(one, shape, ONE, None)
    ran(one, TREE, ONE, 5.0)
    ran(one, ROOT_ONLY, Load.of(8, 0), 1.0)
    ran(one, ROOT_ONLY, Load.of(8, 0), 1.0, 0)
    ran(one, TREE, Load.of(8, 0), 9.0)
    assert one.costs.relative(TREE, ONE) == before


def test_batches_and_long_texts_have_times_of_their_own():
    one, eight, long = chooser(), Load.of(8, 0), Load.of(1, 3000)
    for _ in range(2):
        for load, cost in ((ONE, 1.2), (eight, 4.0), (long, 1.4)):
            ran(one, ROOT_ONLY, load, 1.0)
            ran(one, TREE, load, cost)
            ran(one, ROOT_ONLY, load, 1.0)
    found = [one.costs.relative(TREE, load) for load in (ONE, eight, long)]
    assert found == pytest.approx([1.2, 4.0, 1.4])


def test_costs_of_another_load_correct_the_curve():
    costs = Costs(CostCurve(((1, 1.0), (64, 7.3)), 0.0, 0.0, 0.0), slots=8)
    guess = costs.relative(TREE, Load.of(8, 0))
    assert guess == pytest.approx(7.3 / 1.7)
    for _ in range(COMPARISONS):
        costs.compare(TREE, ONE, 2 * guess)
    assert costs.relative(TREE, Load.of(8, 0)) == pytest.approx(2 * guess)


def test_a_tree_that_is_dear_tells_of_others():
    """Where none was compared often, the guess stands."""
    costs = Costs(usual_curve(True, True), slots=1)
    guesses = [costs.relative(shape, ONE) for shape in LADDER]
    for _ in range(COMPARISONS):
        costs.compare(LADDER[0], ONE, 1 + 2 * (guesses[0] - 1))
    found = [costs.relative(shape, ONE) for shape in LADDER]
    assert np.subtract(found, 1) == pytest.approx(2 * np.subtract(guesses, 1))
    assert costs.relative(TREE, Load.of(1, 5000)) > guesses[0]


def test_a_level_costs_the_tokens_of_its_time():
    """At so many tokens in the time of a step that runs levels for all but two."""
    curve = CostCurve(((1, 1.0), (64, 7.3)), 0.2, 0.1, 0.3)
    step = curve.step(ROOT_ONLY, TREE.num_nodes) + 0.2
    for tokens, count in ((1.0, 0.0), (2.5, 0.5), (99.0, TREE.depth - 1)):
        price = curve.level_price(TREE, 1, tokens)
        assert price == pytest.approx(0.1 * tokens / (step + 0.1 * count))
    assert curve.level_price(ROOT_ONLY, 1, 1.0) == pytest.approx(0.1 / 1.5)


def test_known_costs_survive_a_file():
    kept = []
    costs = Costs(usual_curve(True, True), 1, keep=kept.append)
    for number in range(8):
        costs.compare(LADDER[number % 2], Load.of(2, 2000), 1.5 + number / 10)
    known = Known.from_dict(kept[-1].as_dict())
    assert known == kept[-1] and len(kept) == 2
    again = Costs(usual_curve(True, True), 1, known)
    for shape in LADDER:
        for load in (ONE, Load.of(2, 2000)):
            expected = costs.relative(shape, load)
            assert again.relative(shape, load) == pytest.approx(expected, rel=1e-3)


def test_only_compiled_shapes_run_and_others_are_asked_for():
    """Plain decoding first, then the first tree; larger ones once they would pay."""
    gains = ladder((1.6, 2.4), (1.3, 1.9), (1.8, 3.2), (3.9, 3.4))
    script = Script(gains, ready=set())
    one, ready = script.chooser, script.ready
    assert one.wanted(script.requests, ready) is None
    assert script.dispatch(3) == [Choice(ROOT_ONLY, None)] * 3
    while not (wanted := one.wanted(script.requests, ready)):
        script.dispatch()
    ready.add(ROOT_ONLY)
    emitted = sum(map(steps_of, script.ran))
    assert wanted == TREE and emitted <= WORTH_TREES + 5 * STEPS
    ready.add(TREE)
    assert one.wanted(script.requests, ready) == REHEARSAL
    ready.add(REHEARSAL)
    asked = []
    for _ in range(2 * WORTH_COMPILING):
        script.dispatch()
        if wanted := one.wanted(script.requests, ready):
            asked.append(wanted)
            ready.add(wanted)
    assert LADDER[2] in asked and script.share(RARELY, LADDER[2]) > 0.9
    assert {c.shape for c in script.ran} <= ready


def test_texts_that_do_not_speculate_count_as_plain():
    one, plain = chooser(), request(speculate=False)
    assert one.choose(None, [plain], (TREE, ROOT_ONLY)) == Choice(ROOT_ONLY, None)
    both, alone = (one._tokens(texts)[0] for texts in ([plain, request()], [request()]))
    assert both == pytest.approx((1 + alone) / 2)
