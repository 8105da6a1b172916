"""`paceline ledger RUN` balances on a run going on, killed or over, and finds what is wrong."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict

import pytest

from paceline.configs.load import dump_config, load_config
from paceline.controller.cli import main
from paceline.controller.ledger.balance import audit
from paceline.controller.ledger.events import Event, Kind
from paceline.controller.ledger.opening import open_store
from paceline.controller.ledger.state import fold
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.summary import RunSummary
from tests.controller.builders import make_group
from tests.controller.ledger.appender import life_of

STORY = [
    *(event for group_id in range(6) for event in life_of(group_id)),
    Event(Kind.BATCHED, 0, 1.0, {"trained": [0, 1], "held": [], "dropped": {"2": "zero_signal"}}),
    Event(Kind.TRAINED, 0, 2.0, {"checksum": 7}),
    Event(Kind.BATCHED, 1, 3.0, {"trained": [3, 4], "held": [], "dropped": {}}),
    Event(Kind.ADMITTED, 6, 4.0, {"prompt": "p6"}),
    Event(Kind.CLAIMED, 6, 5.0),
    Event(Kind.RETURNED, 6, 6.0, {"reason": "worker_lost"}),
]


@pytest.fixture(params=["sqlite", "redis"])
def run(request, tmp_path):
    """A run's folder whose controller died after `STORY`."""
    overrides = [f"store.type={request.param}", f"name={tmp_path.name}"]
    if request.param == "redis":
        overrides.append(f"store.url={request.getfixturevalue('shared_redis').url}")
    config = load_config("debug", overrides)
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config(dump_config(config))
    store = open_store(config.store, folder.root, config.name)
    store.append(STORY)
    store.forget([2])
    yield Run(folder, config, store)
    store.close()


class Run:
    def __init__(self, folder, config, store):
        self.folder, self.config, self.store = folder, config, store

    def audit(self):
        reader = open_store(self.config.store, self.folder.root, self.config.name, read_only=True)
        try:
            return audit(reader)
        finally:
            reader.close()

    def balance(self, monkeypatch, capsys):
        """Exit code of the command, and what it prints."""
        monkeypatch.setattr("sys.argv", ["paceline", "ledger", str(self.folder.root)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out + captured.err


def write_summary(run, trained, status="finished"):
    summary = RunSummary(
        run.config.name, status, {}, 1, 1, 2, groups={"generated": 6, "trained": trained}
    )
    run.folder.summary.write_text(json.dumps(asdict(summary)))


def test_the_books_of_a_run_going_on_balance(run, monkeypatch, capsys):
    code, text = run.balance(monkeypatch, capsys)
    assert code == 0, text
    assert text.endswith("7 admitted = 2 trained + 1 dropped + 4 pending: balanced\n")
    words = " ".join(text.split())
    assert "dropped zero_signal: 1" in words
    assert "pending waiting: 1, finished: 1, batched: 2" in words
    assert "age at training 0: 2, 1: 2" in words
    assert "claims given back 1" in words


def test_a_snapshot_that_says_what_came_before_is_in_order(run):
    run.store.append([Event(Kind.SNAPSHOT, 1, 7.0, fold(STORY).as_dict())])
    found = run.audit()
    assert found.faults == []
    assert found.state.balance().admitted == 7


def test_missing_samples_are_a_fault_wherever_they_are_still_needed(run, monkeypatch, capsys):
    for group_id in (0, 3, 5):  # trained but not settled, batched, finished
        run.store.forget([group_id])
    assert [fault.split(":")[0] for fault in run.audit().faults] == [
        f"the samples of group {group_id} are missing" for group_id in (0, 3, 5)
    ]
    code, text = run.balance(monkeypatch, capsys)
    assert code == 1
    assert "the samples of group 5 are missing" in text
    assert text.endswith("pending: NOT IN ORDER\n")


def test_samples_that_are_not_needed_any_more_may_be_gone(run):
    run.store.append([Event(Kind.SETTLED, 1, 7.0)])
    run.store.forget([0, 1])
    assert run.audit().faults == []


def test_an_event_that_cannot_be_is_named(run, monkeypatch, capsys):
    run.store.append([Event(Kind.CLAIMED, 0, 8.0)])
    code, text = run.balance(monkeypatch, capsys)
    assert code == 1
    assert "the ledger has group 0 trained where it becomes claimed" in text


def test_a_summary_that_counts_other_groups_is_a_fault(run, monkeypatch, capsys):
    write_summary(run, trained=2)
    assert run.balance(monkeypatch, capsys)[0] == 0
    write_summary(run, trained=3)
    code, text = run.balance(monkeypatch, capsys)
    assert code == 1
    assert "summary.json has 3 trained groups, the ledger 2" in text


def test_the_summary_of_a_run_that_was_resumed_since_is_not_compared(run, monkeypatch, capsys):
    write_summary(run, trained=9, status="interrupted")
    assert run.balance(monkeypatch, capsys)[0] == 0


class Moving:
    """A store whose run goes on between the reading of its events and that of its samples."""

    def __init__(self, store, moves):
        self._store, self._moves = store, moves

    def __getattr__(self, name):
        return getattr(self._store, name)

    def history(self, *, whole=False):
        yield from self._store.history(whole=whole)
        if self._moves:
            self._moves.pop()()


def test_samples_that_are_forgotten_while_the_ledger_is_read_are_no_fault(run):
    def settle():
        run.store.append([Event(Kind.SETTLED, 1, 7.0)])
        run.store.forget([0, 1])

    reader = open_store(run.config.store, run.folder.root, run.config.name, read_only=True)
    found = audit(Moving(reader, [settle]))
    assert found.faults == []
    assert found.state.settled == 1
    reader.close()


@pytest.mark.parametrize("run", ["sqlite"], indirect=True)
def test_damaged_samples_are_a_fault(run, monkeypatch, capsys):
    run.store.close()
    database = sqlite3.connect(run.folder.root / "ledger.sqlite")
    content = bytearray(
        database.execute("SELECT content FROM samples WHERE group_id = 4").fetchone()[0]
    )
    content[100] ^= 1
    with database:
        database.execute("UPDATE samples SET content = ? WHERE group_id = 4", (bytes(content),))
    database.close()
    code, text = run.balance(monkeypatch, capsys)
    assert code == 1
    assert "the stored samples of group 4 are damaged" in text


@pytest.mark.parametrize("run", ["sqlite"], indirect=True)
def test_a_snapshot_that_says_something_else_is_a_fault(run):
    run.store.append([Event(Kind.SNAPSHOT, 1, 7.0, fold(STORY[:-1]).as_dict())])
    assert run.audit().faults == ["the snapshot at step 1 differs from what came before"]


@pytest.mark.parametrize("run", ["sqlite"], indirect=True)
def test_a_run_without_a_ledger_is_a_mistake_in_the_command(run, monkeypatch, capsys):
    run.store.close()
    (run.folder.root / "ledger.sqlite").unlink()
    code, text = run.balance(monkeypatch, capsys)
    assert code == 2
    assert "there is no ledger" in text and "\n" not in text.rstrip("\n")
    monkeypatch.setattr("sys.argv", ["paceline", "ledger", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


def test_looking_changes_nothing(run):
    before = list(run.store.history()), run.store.group_ids()
    run.audit()
    run.store.append(
        [Event(Kind.CLAIMED, 6, 9.0), Event(Kind.FINISHED, 6, 9.0, VERSIONS, make_group(6))]
    )
    after = list(run.store.history()), run.store.group_ids()
    assert after[0][: len(before[0])] == before[0]
    assert after[1] == before[1] | {6}


VERSIONS = {"oldest": 0, "newest": 1}
