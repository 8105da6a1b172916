"""Gathering: all results, or one error with nothing left running."""

import asyncio

import pytest

from paceline.controller.groups.concurrency import gather_or_cancel


class Task:
    """Works until told otherwise, and knows how it ended."""

    def __init__(self, clean_up_seconds=0.0):
        self.ended = None
        self.clean_up_seconds = clean_up_seconds

    async def run(self):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(self.clean_up_seconds)
            self.ended = "cancelled"
            raise


async def fail(error, after=0.0):
    await asyncio.sleep(after)
    raise error


def test_results_come_in_the_order_of_what_was_awaited():
    async def later(value, seconds):
        await asyncio.sleep(seconds)
        return value

    assert asyncio.run(gather_or_cancel(later("a", 0.02), later("b", 0.0))) == ["a", "b"]


def test_the_first_failure_is_raised_once_the_others_have_cleaned_up():
    async def scenario():
        tasks = [Task(clean_up_seconds=0.02), Task()]
        with pytest.raises(ZeroDivisionError):
            await gather_or_cancel(*(t.run() for t in tasks), fail(ZeroDivisionError()))
        return [task.ended for task in tasks], asyncio.all_tasks() - {asyncio.current_task()}

    ended, left = asyncio.run(scenario())
    assert ended == ["cancelled", "cancelled"]
    assert left == set()


def test_a_failure_while_cleaning_up_does_not_hide_the_first():
    async def stubborn():
        try:
            await asyncio.Event().wait()
        finally:
            raise KeyError("later")

    with pytest.raises(ZeroDivisionError):
        asyncio.run(gather_or_cancel(stubborn(), fail(ZeroDivisionError(), after=0.01)))


def test_cancelling_the_whole_cancels_the_parts():
    async def scenario():
        task = Task()
        whole = asyncio.create_task(gather_or_cancel(task.run()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        whole.cancel()
        with pytest.raises(asyncio.CancelledError):
            await whole
        return task.ended

    assert asyncio.run(scenario()) == "cancelled"
