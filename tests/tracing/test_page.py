"""The page: whole in itself, small, and its figures those of the statistics."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import subprocess

import pytest

from tests.conftest import BROWSER
from tests.tracing.synthetic import random_trace
from treespec_jax.tracing import page, trace

VOID = {"meta", "input", "link", "br", "hr", "img"}
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.S)


class Balanced(html.parser.HTMLParser):
    """Asserts that every element is closed in its turn, and lists their names."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.references = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def embedded(text: str) -> list[trace.Trace]:
    """The traces inside a page."""
    (data,) = DATA.findall(text)
    return trace.from_json(json.loads(data))


def test_the_page_is_well_formed_and_needs_nothing_else():
    text = page.render([random_trace(5)])
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert not parser.open and not parser.references
    assert parser.seen.count("script") == 2 and "link" not in parser.seen
    code = DATA.sub("", text)
    assert not re.search(r"https?://|@import|url\(|\bimport\b|fetch\(", code)
    assert "{{" not in code.partition("<script")[0]


def test_the_page_holds_the_traces():
    traces = [random_trace(5), random_trace(4, seed=1)]
    assert embedded(page.render(traces)) == traces


def test_tokens_cannot_end_the_script():
    found = random_trace(2)
    words = {token: "</script><b>&amp;<!--" for token in found.vocabulary}
    found = dataclasses.replace(found, vocabulary=words, prompt=(("", "<i>&"),))
    text = page.render([found])
    parser = Balanced()
    parser.feed(text)
    assert not parser.open and "b" not in parser.seen and "i" not in parser.seen[:12]
    assert embedded(text) == [found]


def test_two_thousand_steps_are_small():
    """Of 31 nodes each; the page is meant to be under 10 MB."""
    assert len(page.render([random_trace(2000)]).encode()) < 4e6


def in_browser(text: str, script: str, folder) -> dict:
    """What `script`, an expression run behind the page's own, finds there."""
    report = f"document.title = JSON.stringify({script});"
    errors = "window.addEventListener('error', (e) => { window.failed = e.message; });"
    text = text.replace("<body>", f"<body><script>{errors}</script>")
    text = text.replace("</body>", f'<script type="module">{report}</script></body>')
    (folder / "t.html").write_text(text, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"]
    done = subprocess.run(
        [*command, (folder / "t.html").as_uri()], capture_output=True, timeout=300
    )
    titles = re.findall(r"<title>(.*?)</title>", done.stdout.decode(), re.S)
    assert titles, done.stderr.decode()[-2000:]
    return json.loads(html.unescape(titles[0]))


# Steps on, by key and by slider, and what is drawn each time.
VISIT = """(() => {
  const seen = [], look = () => seen.push({
    step: treespec.step,
    nodes: document.querySelectorAll("#tree .node").length,
    spots: new Set([...document.querySelectorAll("#tree .node rect")].map((rect) =>
      `${rect.getAttribute("x")} ${rect.getAttribute("y")}`)).size,
    accepted: document.querySelectorAll("#tree .node.accepted").length,
    bonus: document.querySelectorAll("#tree .node.bonus").length,
    now: document.querySelectorAll("#text .now").length,
    text: [...document.querySelectorAll("#text .t:not(.later)")].length,
  });
  const press = (key) => document.body.dispatchEvent(
    new KeyboardEvent("keydown", { key, bubbles: true }));
  look();
  for (const key of ["ArrowRight", "ArrowRight", "End", "ArrowLeft", "Home"]) {
    press(key); look();
  }
  const slider = document.getElementById("slider");
  slider.value = 3; slider.dispatchEvent(new Event("input")); look();
  document.querySelector("#tree .node:last-child")
    .dispatchEvent(new FocusEvent("focusin", { bubbles: true }));
  return {
    seen, totals: treespec.totals, failed: window.failed ?? null,
    tip: document.getElementById("tip").textContent,
    figures: document.getElementById("figures").textContent,
  };
})()"""


@pytest.mark.browser
def test_what_a_browser_draws(tmp_path):
    found = random_trace(9)
    shown = in_browser(page.render([found]), VISIT, tmp_path)
    assert shown["failed"] is None
    last, stats = len(found.steps) - 1, found.stats
    assert [look["step"] for look in shown["seen"]] == [0, 1, 2, last, last - 1, 0, 3]
    for look in shown["seen"]:
        step = found.steps[look["step"]]
        assert look["spots"] == look["nodes"] == len(step.parents) + step.has_bonus
        assert look["accepted"] == len(step.path)
        assert look["bonus"] == step.has_bonus
        assert look["now"] == len(step.emitted)
        through = found.steps[: look["step"] + 1]
        assert look["text"] == sum(len(step.emitted) for step in through)
    totals = shown["totals"]
    for name in ("tokens", "steps", "drafted", "accepted"):
        assert totals[name] == stats[name]
    assert totals["bySource"] == list(stats["accepted_by_source"].values())
    deep = len(totals["depth"])
    assert totals["depth"] == pytest.approx(stats["acceptance_by_depth"][:deep])
    assert f"{stats['tokens_per_step']:.2f}tokens per step" in shown["figures"]
    assert "token id" in shown["tip"] and "target" in shown["tip"]


@pytest.mark.browser
@pytest.mark.parametrize("steps", [0, 1])
def test_a_browser_shows_little_and_nothing(tmp_path, steps):
    """Plain decoding has roots alone; an interrupted text may have no step."""
    found = random_trace(steps, nodes=1, depth=1)
    line = trace.Timeline(("a", " b"), ((0.1, 1), (0.25, 1)))
    found = dataclasses.replace(found, replay={"tree": line, "plain": line})
    script = "{ failed: window.failed ?? null, steps: treespec.totals.steps, "
    script += "sides: document.querySelectorAll('.said').length }"
    shown = in_browser(page.render([found]), script, tmp_path)
    assert shown == {"failed": None, "steps": steps, "sides": 2}


# The legend's colours by name, and those of nodes, edges and tokens at every step.
COLOURS = """(() => {
  const of = (element, name) => getComputedStyle(element)[name];
  const legend = [...document.querySelectorAll("#legend span")].map((entry) =>
    [entry.textContent, of(entry.querySelector("i"), "backgroundColor")]);
  const steps = [];
  for (let n = 0; n < treespec.totals.steps; n++) {
    const slider = document.getElementById("slider");
    slider.value = n; slider.dispatchEvent(new Event("input"));
    const draw = (kind, part, name) =>
      Object.fromEntries([...document.querySelectorAll(`#tree .node.${kind}`)].map(
        (node) => [node.dataset.n, of(node.querySelector(part), name)]));
    steps.push({
      accepted: draw("accepted", "rect", "stroke"),
      rejected: draw("rejected", ".mark", "fill"),
      outline: draw("rejected", "rect", "stroke"),
      bonus: draw("bonus", "rect", "stroke"),
      text: [...document.querySelectorAll("#text .now")].map((token) =>
        of(token, "boxShadow").match(/rgba?\\([^)]*\\)/)[0]),
    });
  }
  return { legend, steps };
})()"""


@pytest.mark.browser
def test_colours_mean_what_the_legend_says(tmp_path):
    found = random_trace(9)
    shown = in_browser(page.render([found]), COLOURS, tmp_path)
    legend = dict(shown["legend"])
    *drafted, target, unaccepted = [colour for _, colour in shown["legend"]]
    assert list(legend)[:-2] == [f"drafted by {name}" for name in found.sources]
    assert len({*drafted, target, unaccepted}) == len(found.sources) + 2
    for step, drawn in zip(found.steps, shown["steps"], strict=True):
        of_source = {str(n): drafted[s] for n, s in enumerate(step.sources)}
        assert set(drawn["accepted"]) == {str(n) for n in step.path}
        for kind in ("accepted", "rejected"):
            for node, colour in drawn[kind].items():
                assert colour == of_source[node]
        assert set(drawn["outline"].values()) <= {unaccepted}
        assert set(drawn["bonus"].values()) == ({target} if step.has_bonus else set())
        came = [of_source[str(n)] for n in step.accepted]
        assert drawn["text"] == [*came, target][: len(step.emitted)]


@pytest.mark.browser
def test_a_browser_steps_through_two_thousand_steps(tmp_path):
    found = random_trace(2000)
    shown = in_browser(page.render([found]), VISIT, tmp_path)
    assert shown["failed"] is None
    assert [look["step"] for look in shown["seen"]] == [0, 1, 2, 1999, 1998, 0, 3]
    assert shown["totals"]["tokens"] == found.stats["tokens"]
