"""Reliability tables and the fit of tau, on records made by a known tau."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from treespec_jax.checkpoints import calibration as files
from treespec_jax.errors import UserError
from treespec_jax.trees.records import TreeRecord
from treespec_jax.tuning import calibration

K = 8


def log_softmax(v):
    return v - np.logaddexp.reduce(v)


def records(true_tau, read_tau, count=4000, some=1.0, seed=0):
    """Roots of K children whose right one follows softmax(v / true_tau).

    The estimates are those of `read_tau`; a share of the families has no right one.
    """
    rng = np.random.default_rng(seed)
    parents = np.zeros(K + 1, int)
    out = []
    for _ in range(count):
        v = np.sort(rng.gumbel(size=K) * 1.5)[::-1]
        probability = np.concatenate([[0.0], log_softmax(v / read_tau)])
        right = rng.choice(K, p=np.exp(log_softmax(v / true_tau))) + 1
        path = np.array([0, right if rng.random() < some else 0])
        out.append(TreeRecord(parents, probability, path))
    return out


@pytest.mark.parametrize("true_tau", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("read_tau", [0.7, 1.5])
def test_the_fit_finds_the_tau_that_made_the_records(true_tau, read_tau):
    tau, families = calibration.fit_tau(records(true_tau, read_tau), read_tau)
    assert families == 4000
    assert tau == pytest.approx(true_tau, rel=0.1)


def test_the_fit_is_the_likeliest_on_a_grid():
    own = records(0.9, 0.7, count=300)
    tau, _ = calibration.fit_tau(own, 0.7)

    def likelihood(wanted):
        total = 0.0
        for record in own:
            v = 0.7 * record.log_prob[1:] / wanted
            total += log_softmax(v)[record.path[1] - 1]
        return total

    grid = np.geomspace(0.1, 10, 400)
    best = grid[np.argmax([likelihood(t) for t in grid])]
    assert tau == pytest.approx(best, rel=0.02)


def test_the_table_is_flat_under_the_right_tau_only():
    own = records(1.0, 0.3)
    before = calibration.reliability(own)
    after = calibration.reliability(calibration.retempered(own, 0.3, 1.0))
    assert calibration.error(after) < 0.01 < 0.03 < calibration.error(before)
    for rows in (before, after):
        assert sum(row["nodes"] for row in rows) == 4000 * K
        right = sum(row["nodes"] * row["realised"] for row in rows)
        assert right == pytest.approx(4000)


def test_families_follow_the_path_and_leave_out_empty_places():
    parents = np.array([0, 0, 0, 1, 1, 2, 2])
    probability = np.log(np.array([1.0, 0.6, 0.3, 0.5, 0.0, 0.4, 0.2]) + 1e-300)
    probability[4] = -np.inf
    record = TreeRecord(parents, probability, np.array([0, 2, 6, 0]))
    families = [(list(c), right) for c, right in record.families()]
    assert families == [([1, 2], 2), ([5, 6], 6)]
    assert calibration.accepted_by_rank([record, record]) == [0, 4]
    stopped = TreeRecord(parents, probability, np.array([0, 1, 0, 0]))
    assert [list(c) for c, right in stopped.families() if right is None] == [[3]]
    assert calibration.accepted_by_rank([stopped]) == [1]
    assert calibration.reliability([])[0]["nodes"] == 0


def test_nothing_to_fit():
    with pytest.raises(ValueError, match="no family"):
        calibration.fit_tau(records(1.0, 1.0, count=5, some=0.0), 1.0)


def test_what_is_kept_beside_a_drafter(tmp_path):
    assert files.read_tau(tmp_path) is None
    file = files.output_file(tmp_path, "")
    files.write(file, {"tau": 0.45})
    assert files.read_tau(tmp_path) == 0.45
    assert [p.name for p in tmp_path.iterdir()] == [files.NAME]
    for bad in ("{", "[]", '{"tau": "x"}', '{"tau": 0}', '{"tau": NaN}', "{}"):
        file.write_text(bad)
        with pytest.raises(UserError, match="tau above 0"):
            files.read_tau(tmp_path)
    model = tmp_path / "model.bin"
    model.write_bytes(b"")
    assert files.read_tau(model) is None
    with pytest.raises(UserError, match="--output=FILE"):
        files.output_file(model, "")
    assert files.output_file(model, tmp_path / "own.json") == tmp_path / "own.json"
    with pytest.raises(UserError, match="cannot write"):
        files.output_file(model, tmp_path / "none" / "own.json")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / files.NAME
    file.write_text(json.dumps({"tau": 0.5}))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        files.write(file, {"tau": 0.9})
    assert files.read_tau(tmp_path) == 0.5
    assert len(list(tmp_path.iterdir())) == 1
