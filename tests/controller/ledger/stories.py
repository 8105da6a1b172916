"""Histories of runs as hypothesis draws them: every event follows from those before it."""

from __future__ import annotations

from hypothesis import strategies as st

from paceline.controller.ledger.events import Event, Kind
from paceline.controller.ledger.state import LedgerState, Status
from tests.controller.builders import make_group


def possible(state: LedgerState):
    """Every event that may come next, but for the batches' choice of groups."""
    for group_id, life in state.live.items():
        if life.status is Status.WAITING:
            yield Event(Kind.CLAIMED, group_id, 1.5)
        elif life.status is Status.CLAIMED:
            yield Event(Kind.RETURNED, group_id, 2.0, {"reason": "worker_lost"})
            versions = {"oldest": state.step, "newest": state.step + 1}
            yield Event(Kind.FINISHED, group_id, 3.0, versions, make_group(group_id))
        elif life.status is Status.FINISHED:
            yield Event(Kind.SET_ASIDE, group_id, 4.0, {"reason": "zero_signal"})
    finished = state.with_status(Status.FINISHED)
    if finished:
        detail = {
            "trained": finished[:1],
            "held": [],
            "dropped": dict.fromkeys(finished[1:2], "grader_error"),
        }
        yield Event(Kind.BATCHED, max(state.batches, default=state.step - 1) + 1, 5.0, detail)
    if state.step in state.batches:
        yield Event(Kind.TRAINED, state.step, 6.0, {"checksum": 1000 + state.step})
    for step in range(state.settled, state.step + 1):
        yield Event(Kind.RESUMED, step, 7.0, {"keep_batches": step % 2 == 0})
        yield Event(Kind.SETTLED, step, 8.0)
    yield Event(Kind.ADMITTED, state.last + 1, 1.0, {"prompt": f"p{state.last + 1}"})


@st.composite
def stories(draw, longest=60):
    """Events and the state after each."""
    state, events, states = LedgerState(), [], []
    for _ in range(draw(st.integers(0, longest))):
        event = draw(st.sampled_from(list(possible(state))))
        state.apply(event)
        events.append(event)
        states.append(LedgerState.from_dict(state.as_dict()))
    return events, states
