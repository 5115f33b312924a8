"""A Ray of a run's own that does not start in the time that Ray gives it."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from pipeline.cluster import cluster
from pipeline.errors import ConfigError


def starting(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init(**options: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_too_late_is_one_line_that_says_what_to_do(monkeypatch):
    said = "The current node timed out during startup. This could happen because some of the raylet failed to startup."
    starting(monkeypatch, Exception(said))
    with pytest.raises(ConfigError, match=r"did not start within the 30 s .* too busy.* cluster\.address"), cluster(None):
        pytest.fail("no Ray, and yet it goes on")


def test_what_else_goes_wrong_is_left_as_it_is(monkeypatch):
    broken = Exception("something else")
    starting(monkeypatch, broken)
    with pytest.raises(Exception, match="something else") as raised, cluster(None):
        pytest.fail("no Ray, and yet it goes on")
    assert raised.value is broken


def test_what_a_block_raises_is_not_taken_for_it(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(TimeoutError, match="timed out during startup"), cluster(None):
        raise TimeoutError("an Executor timed out during startup")
