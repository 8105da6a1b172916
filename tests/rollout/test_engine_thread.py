"""The engine's thread: updates between steps, failures reach every caller."""

import threading
import time

import pytest

from paceline.configs.errors import DataError
from paceline.configs.vocabulary import RolloutRequest, SamplingParameters, WeightVersion
from paceline.rollout.engine import RolloutResult
from paceline.rollout.engine_thread import EngineThread
from paceline.weights_sync.handle import WeightHandle
from paceline.weights_sync.layout import Layout
from tests.controller.builders import make_completion


class FakeEngine:
    """Finishes each request after ``steps`` steps, with the version it then has."""

    def __init__(self, steps=3):
        self.version, self.steps, self.broken = None, steps, None
        self.running = {}
        self.threads = set()
        self.in_step = False

    def add(self, request):
        if not request.prompt_token_ids:
            raise DataError("empty prompt")
        self.running[request.request_id] = self.steps

    def step(self):
        self.threads.add(threading.get_ident())
        self.in_step = True
        time.sleep(0.002)
        if self.broken:
            raise self.broken
        self.running = {name: left - 1 for name, left in self.running.items()}
        done = [name for name, left in self.running.items() if left == 0]
        for name in done:
            del self.running[name]
        self.in_step = False
        return [RolloutResult(name, (make_completion(self.version),)) for name in done]

    def has_work(self):
        return bool(self.running)

    def update_weights(self, handle):
        assert not self.in_step
        if handle.checksum < 0:
            raise OSError("torn")
        self.version = handle.version


def handle(version, checksum=0):
    return WeightHandle(WeightVersion(version), "", checksum, Layout(()))


def request(name, prompt=(1,)):
    return RolloutRequest(name, prompt, SamplingParameters(), 1, seed=0)


@pytest.fixture
def engine_and_thread():
    engine = FakeEngine()
    thread = EngineThread(lambda: engine)
    thread.wait_ready()
    thread.update_weights(handle(0)).result(5)
    yield engine, thread
    thread.close()


def test_requests_and_updates_interleave_on_one_thread(engine_and_thread):
    engine, thread = engine_and_thread
    futures = []
    for version in range(1, 20):
        futures.append(thread.generate(request(f"r{version}")))
        futures.append(thread.update_weights(handle(version)))
    for future in futures:
        future.result(5)
    assert len(engine.threads) == 1
    assert engine.version == 19


def test_an_unservable_request_fails_alone(engine_and_thread):
    _, thread = engine_and_thread
    bad, good = thread.generate(request("bad", ())), thread.generate(request("good"))
    with pytest.raises(DataError):
        bad.result(5)
    assert len(good.result(5)) == 1


def test_an_engine_that_breaks_fails_what_is_pending_and_all_that_comes(engine_and_thread):
    engine, thread = engine_and_thread
    engine.broken = MemoryError("out of memory")
    with pytest.raises(MemoryError):
        thread.generate(request("pending")).result(5)
    with pytest.raises(MemoryError):
        thread.generate(request("later")).result(5)


def test_an_update_that_fails_ends_the_engine_rather_than_serving_old_weights(engine_and_thread):
    _, thread = engine_and_thread
    with pytest.raises(OSError, match="torn"):
        thread.update_weights(handle(1, checksum=-1)).result(5)
    with pytest.raises(OSError, match="torn"):
        thread.generate(request("later")).result(5)


def test_an_engine_that_cannot_be_built_says_why():
    def build():
        raise DataError("no such model")

    with pytest.raises(DataError, match="no such model"):
        EngineThread(build).wait_ready()


def test_without_weights_nothing_is_served():
    thread = EngineThread(FakeEngine)
    with pytest.raises(AssertionError, match="never given weights"):
        thread.generate(request("early")).result(5)
    thread.close()
