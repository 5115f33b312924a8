"""Budgets, and the bookkeeping of slots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from store.arena import Arena, build
from store.errors import SpaceError
from store.layout import ArenaLayout
from store.slots import Slots, parse_budget

MiB, GiB = 2**20, 2**30
SLOT = 3 * MiB
EXPERTS = 100 * SLOT
FREE = 10 * GiB
CPU = torch.device("cpu")


@pytest.fixture
def arena(arena_dir: Path) -> Arena:
    """Two layers, whose blocks are 256 and 1024 bytes; the byte at i is i % 251."""
    layout = ArenaLayout.of([(4, {"w": ((64,), "float32")}), (4, {"w": ((16, 16), "float32")})], {})
    return build(arena_dir / "a", layout, "", lambda m: m.copy_((torch.arange(m.numel()) % 251).to(torch.uint8)))


@pytest.mark.parametrize(
    ("budget", "slots"),
    [
        ("0", 0),
        ("0%", 0),
        ("0GiB", 0),
        ("20%", 20),
        ("37%", 37),
        ("37 %", 37),
        (" 20% ", 20),
        ("0.5%", 0),  # half a slot
        ("12.9%", 12),
        ("100%", 100),
        ("100.0%", 100),
        ("3MiB", 1),
        ("8.9MiB", 2),
        ("9 MiB", 3),
        (str(3 * MiB), 1),
        (f"{3 * MiB - 1}B", 0),
        ("5B", 0),
        (f"{3 * MiB}B", 1),
        ("3072KiB", 1),
        ("1.5MB", 0),
        ("31.5MB", 10),  # 31,500,000 / 3,145,728 = 10.01
        ("3e8", 95),
        ("31457KB", 9),
        ("0.2GB", 63),
        ("2GiB", 100),  # more than all experts buys no more than all
        ("auto", 100),
    ],
)
def test_a_budget_buys_whole_slots(budget, slots):
    assert parse_budget(budget, EXPERTS, SLOT, FREE) == slots


@pytest.mark.parametrize(
    ("budget", "why"),
    [
        ("lots", "not a budget"),
        ("", "not a budget"),
        ("%", "not a budget"),
        ("GiB", "not a budget"),
        ("2gib", "not a budget"),
        ("20%%", "not a budget"),
        ("20 per cent", "not a budget"),
        ("nan", "not a budget"),
        ("nanGiB", "not a budget"),
        ("nan%", "not between 0% and 100%"),
        ("inf", "not a budget"),
        ("-inf", "not a budget"),
        ("infGiB", "not a budget"),
        ("inf%", "not between 0% and 100%"),
        ("-3", "negative"),
        ("-1GiB", "negative"),
        ("-5%", "not between 0% and 100%"),
        ("101%", "not between 0% and 100%"),
        ("100.1%", "not between 0% and 100%"),
    ],
)
def test_what_is_no_budget_is_refused_in_one_line_that_names_key_and_value(budget, why):
    with pytest.raises(SpaceError) as error:
        parse_budget(budget, EXPERTS, SLOT, FREE)
    message = str(error.value)
    assert message.startswith(f"store.budget: {budget!r} ")
    assert why in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("budget", "instead"),
    [("5", '"5%" or "5GB"'), ("0.2", '"20%" or "0.2GB"'), (" 100", '"100%" or "100GB"'),
     (str(3 * MiB - 1), 'a share such as "20%" or a size such as "2GiB"')],
)  # fmt: skip
def test_a_number_of_less_than_one_expert_says_which_unit_to_write(budget, instead):
    with pytest.raises(SpaceError) as error:
        parse_budget(budget, EXPERTS, SLOT, FREE)
    assert str(error.value).startswith(f"store.budget: {budget!r} is ")
    assert str(error.value).endswith(f" bytes, less than one expert's {SLOT}; write {instead}")


@pytest.mark.parametrize(("budget", "needs"), [("20%", 20 * SLOT), ("50MiB", 50 * MiB), ("100%", EXPERTS), ("999GiB", 999 * 2**30)])
def test_a_budget_above_what_is_free_is_refused_with_the_shortfall_in_bytes(budget, needs):
    free = 40 * MiB
    with pytest.raises(SpaceError, match=rf"'{budget}' is {needs} bytes, {free} are free .*: {needs - free} bytes short$"):
        parse_budget(budget, EXPERTS, SLOT, free)


def test_a_budget_above_what_is_free_is_refused_even_if_all_experts_would_fit():
    with pytest.raises(SpaceError, match=rf": {1 * GiB} bytes short$"):
        parse_budget("2GiB", EXPERTS, SLOT, 1 * GiB)


def test_a_budget_of_exactly_what_is_free_is_granted():
    assert parse_budget("20%", EXPERTS, SLOT, 20 * SLOT) == 20


@pytest.mark.parametrize(("free", "slots"), [(0, 0), (10 * SLOT, 9), (100 * SLOT, 90), (1000 * SLOT, 100)])
def test_auto_takes_nine_tenths_of_what_is_free_and_no_more_than_all_experts(free, slots):
    assert parse_budget("auto", EXPERTS, SLOT, free) == slots


def test_all_slots_together_are_allocated_once_and_hold_the_largest_block(arena):
    slots = Slots(arena, 3, CPU)
    assert slots.count == 3
    assert slots.memory.numel() == 3 * 1024
    start, end = slots.memory.data_ptr(), slots.memory.data_ptr() + slots.memory.numel()
    for key in ((0, 0), (1, 0), (1, 1)):
        bytes_to_fill = slots.admit(key)
        assert bytes_to_fill.numel() == arena.block(*key).numel()
        assert start <= bytes_to_fill.data_ptr() <= end - bytes_to_fill.numel()
    assert not slots.has_free


def test_no_slot_is_a_valid_number_of_slots(arena):
    slots = Slots(arena, 0, CPU)
    assert (slots.count, slots.has_free, slots.memory.numel()) == (0, False, 0)
    assert torch.equal(slots.weights((1, 2), in_slot=False)["w"].view(-1).view(torch.uint8), arena.block(1, 2))


def test_an_expert_is_filled_then_ready_then_gone(arena):
    slots = Slots(arena, 1, CPU)
    key = (0, 3)
    assert key not in slots
    slots.admit(key).copy_(arena.block(*key))
    assert key in slots
    assert not slots.is_ready(key)
    assert not slots.is_evictable(key)
    slots.complete(key)
    assert slots.is_ready(key)
    assert slots.is_evictable(key)
    slots.evict(key)
    assert key not in slots
    assert not slots.is_ready(key)
    assert slots.has_free


def test_the_peak_counts_the_bytes_of_experts_and_stays_below_the_budget_when_less_is_used(arena):
    slots = Slots(arena, 3, CPU)
    budget = slots.memory.numel()
    for key in ((0, 0), (0, 1)):
        slots.admit(key)
        slots.complete(key)
    assert slots.resident_bytes == slots.resident_peak_bytes == 2 * 256
    slots.evict((0, 0))
    slots.admit((1, 0))
    assert slots.resident_bytes == slots.resident_peak_bytes == 256 + 1024
    slots.complete((1, 0))
    slots.evict((1, 0))
    assert slots.resident_bytes == 256
    assert slots.resident_peak_bytes == 256 + 1024 < budget


def test_residents_are_counted_per_layer_once_ready(arena):
    slots = Slots(arena, 4, CPU)
    for key in ((0, 0), (0, 1), (1, 0)):
        slots.admit(key)
        slots.complete(key)
    slots.admit((1, 3))
    assert slots.resident() == {0: 2, 1: 1}
    slots.evict((0, 0))
    slots.complete((1, 3))
    assert slots.resident() == {0: 1, 1: 2}


def test_a_pinned_expert_is_not_evictable_until_every_pin_is_gone(arena):
    slots = Slots(arena, 1, CPU)
    slots.admit((0, 0))
    slots.pin((0, 0))  # while it is being filled
    slots.complete((0, 0))
    slots.pin((0, 0))
    slots.unpin((0, 0))
    assert not slots.is_evictable((0, 0))
    with pytest.raises(AssertionError):
        slots.evict((0, 0))
    slots.unpin((0, 0))
    assert slots.is_evictable((0, 0))
    slots.evict((0, 0))


def test_mistakes_of_the_engine_are_caught(arena):
    slots = Slots(arena, 1, CPU)
    with pytest.raises(AssertionError):
        slots.pin((0, 0))  # not there
    slots.admit((0, 0))
    with pytest.raises(AssertionError):
        slots.admit((0, 0))  # twice
    with pytest.raises(AssertionError):
        slots.admit((0, 1))  # no free slot
    slots.pin((0, 0))
    with pytest.raises(AssertionError):
        slots.weights((0, 0), in_slot=True)  # still being filled
    slots.complete((0, 0))
    with pytest.raises(AssertionError):
        slots.complete((0, 0))  # twice
    slots.unpin((0, 0))
    with pytest.raises(AssertionError):
        slots.weights((0, 0), in_slot=True)  # not pinned
    with pytest.raises(AssertionError):
        slots.unpin((0, 0))  # once too often


def test_the_table_points_into_the_slot_of_the_moment_or_into_the_arena(arena):
    """Also when a slot changes hands, to an expert of the same layer or of a layer with another shape, and back."""
    slots = Slots(arena, 1, CPU)
    slot = range(slots.memory.data_ptr(), slots.memory.data_ptr() + slots.memory.numel())
    for key in ((0, 1), (1, 1), (0, 2), (0, 1), (1, 3)):
        slots.admit(key).copy_(arena.block(*key))
        slots.complete(key)
        slots.pin(key)
        here, there = slots.weights(key, in_slot=True)["w"], slots.weights(key, in_slot=False)["w"]
        assert here.data_ptr() in slot
        assert there.data_ptr() == arena.block(*key).data_ptr()
        assert here.shape == there.shape == ((64,) if key[0] == 0 else (16, 16))
        assert torch.equal(here.view(-1).view(torch.uint8), arena.block(*key))
        assert torch.equal(there.view(-1).view(torch.uint8), arena.block(*key))
        slots.unpin(key)
        slots.evict(key)
