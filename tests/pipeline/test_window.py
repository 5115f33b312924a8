"""How far ahead of the Executor tables are made."""

from __future__ import annotations

import pytest

from pipeline.window import FIRST_LOOKAHEAD, MAX_LOOKAHEAD, REACH, Window


def test_a_number_is_kept_whatever_the_tables_name():
    window = Window(100, 7)
    for uses in (0, 1, 1e6):
        window.saw(uses)
        assert window.lookahead == 7


def test_auto_begins_with_a_few_and_stays_there_while_no_table_names_anything():
    window = Window(100, "auto")
    assert window.lookahead == FIRST_LOOKAHEAD
    window.saw(0)
    assert window.lookahead == FIRST_LOOKAHEAD


@pytest.mark.parametrize(("slots", "uses"), [(10, 20), (100, 50), (64, 32)])
def test_auto_reaches_until_the_queued_tables_name_so_many_times_the_slots(slots, uses):
    window = Window(slots, "auto")
    window.saw(uses)
    assert window.lookahead == pytest.approx(REACH * slots / uses, abs=0.5)


def test_auto_goes_by_the_mean_of_all_batches_so_far():
    window = Window(10, "auto")
    window.saw(5)
    assert window.lookahead == 20
    window.saw(45)
    assert window.lookahead == 4


def test_auto_looks_at_least_one_batch_ahead_and_never_too_far():
    small, large = Window(0, "auto"), Window(10**6, "auto")
    for window in (small, large):
        window.saw(1000.0)
    assert (small.lookahead, large.lookahead) == (1, MAX_LOOKAHEAD)
