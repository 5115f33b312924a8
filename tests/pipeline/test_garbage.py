"""Python's garbage collector leaves alone what stands, where a process has nothing else to do, and only there."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import actors
from pipeline.config import parse
from pipeline.executor import Executor
from pipeline.garbage import spared
from pipeline.prepare import prepare
from store.actor import ExpertStore
from tests.conftest import config_data, save_switch, write_tsv

MANY = 50_000
"""Importing torch alone makes more objects."""


@pytest.fixture
def prepared(tmp_path: Path, arena_dir: Path):
    save_switch(tmp_path / "model")
    made = prepare(parse(config_data(tmp_path / "model", write_tsv(tmp_path / "data.tsv"), arena_dir, tmp_path / "out"), "test"))
    store = ExpertStore(made.arena, made.model.source, made.model.placement)
    store.open()
    yield made
    store.close(keep=False)


class Cycle:
    def __init__(self):
        self.itself = self


@pytest.mark.parametrize("alone", [True, False])
def test_an_executor_spares_its_process_if_it_is_alone_there(prepared, alone):
    before = gc.get_freeze_count()
    executor = None
    try:
        executor = Executor(replace(prepared.executor_spec(), alone=alone))
        frozen, (batch, *_) = gc.get_freeze_count() - before, prepared.batches
        assert frozen > MANY if alone else frozen == 0
        assert len(executor.submit(batch, None).result().results) == len(batch.rows)
        looked_at = {id(each) for each in gc.get_objects()}
        assert (id(type(executor)) in looked_at) is not alone
    finally:
        gc.unfreeze()
        if executor is not None:
            executor.close()


def test_those_that_ray_starts_are_alone(prepared, monkeypatch):
    started = []
    monkeypatch.setattr(actors, "start_actor", lambda cls, spec, **options: started.append(spec))
    actors.start_executors(prepared.executor_spec(), 2)
    assert [(spec.number, spec.alone) for spec in started] == [(0, True), (1, True)]


def test_what_was_spared_is_looked_at_again():
    dropped = Cycle()
    later = weakref.ref(dropped)
    with pytest.raises(KeyError), spared():
        del dropped
        gc.collect()
        assert later() is not None
        own = weakref.ref(Cycle())  # what comes meanwhile is
        gc.collect()
        assert own() is None
        raise KeyError
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert later() is None
