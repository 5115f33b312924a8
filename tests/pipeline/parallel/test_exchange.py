"""Tokens find their experts and come back: equal to the bit to what one process would compute with all experts.

The experts here work on each number by itself, so that neither order nor company can change a bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.parallel.exchange import PeerLost, Traffic
from pipeline.parallel.membership import MeetingPlace, Membership, leave
from pipeline.parallel.placement import EVERYWHERE, Assignment

D_MODEL = 5
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Call:
    """A MoE layer that a rank's forward comes to."""

    layer: int
    tokens: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


def compute(layer: int, tokens: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Of each token its expert's own function."""
    return (tokens.float() * (1 + experts[:, None]) + 10.0 * layer).to(tokens.dtype)


def expected(call: Call) -> torch.Tensor:
    products = torch.zeros(*call.experts.shape, D_MODEL, dtype=torch.promote_types(call.tokens.dtype, call.weights.dtype))
    for k in range(call.experts.shape[1]):
        real = call.experts[:, k] >= 0
        of = compute(call.layer, call.tokens[real], call.experts[real, k])
        products[real, k] = (of * call.weights[real, k, None]).to(products.dtype)
    return products.sum(dim=1).to(call.tokens.dtype)


def work(membership: Membership, calls: list[Call]) -> tuple[list[torch.Tensor], Traffic]:
    """A rank that owns what it serves, and says so if it does not."""
    exchange = membership.join(CPU)
    own = membership.assignment.own(membership.rank)

    def serving(layer: int):
        def serve(tokens: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
            assert len(tokens) and set(experts.tolist()) <= set(own[layer]), "tokens for another rank's experts"
            return compute(layer, tokens, experts)

        return serve

    for layer in range(len(own)):
        exchange.serves(layer, serving(layer))
    try:
        answers = [exchange.round(call.layer, call.tokens, call.experts, call.weights) for call in calls]
        exchange.end()
        return answers, exchange.traffic
    finally:
        leave()


def assignment(ranks: int, *layers: list[int]) -> Assignment:
    return Assignment(tuple(np.array(layer, dtype=np.int16) for layer in layers), ranks)


def call(seed: int, layer: int, tokens: int, experts: int, top_k: int = 1, dtype=torch.float32, none: float = 0.1) -> Call:
    make = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, experts, (tokens, top_k), generator=make)
    chosen[torch.rand(tokens, top_k, generator=make) < none] = -1
    hidden = torch.randn(tokens, D_MODEL, generator=make).to(dtype)
    return Call(layer, hidden, chosen, torch.rand(tokens, top_k, generator=make).to(dtype))


def check(world, plan: Assignment, calls: list[list[Call]]) -> list[Traffic]:
    """Every rank's answers, all at once, against a computation in one place."""
    place = MeetingPlace(plan, timeout_s=30)
    said = world(work, [(place.membership(rank), calls[rank]) for rank in range(plan.devices)])
    for theirs, (answers, _) in zip(calls, said, strict=True):
        for given, answer in zip(theirs, answers, strict=True):
            assert answer.dtype == given.tokens.dtype
            assert torch.equal(answer, expected(given))
    traffic = [counted for _, counted in said]
    pairs = sum(int((given.experts >= 0).sum()) for theirs in calls for given in theirs)
    assert sum(t.sent + t.kept for t in traffic) == pairs
    return traffic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3])
def test_every_rank_gets_what_all_experts_in_one_place_would_give(world, dtype, top_k):
    plan = assignment(3, [0, 1, 2, 0, 1, 2, 2], [2, 1, 0, 0, 1])
    calls = [[call(10 * r, 0, 17 + r, 7, top_k, dtype), call(10 * r + 1, 1, 9, 5, top_k, dtype)] for r in range(3)]
    traffic = check(world, plan, calls)
    assert all(t.sent > 0 and t.kept > 0 for t in traffic)


def test_all_tokens_for_one_expert_and_none_for_the_rest(world):
    plan = assignment(3, [0, 1, 2, 0])
    calls = [[replace(call(r, 0, 11, 4), experts=torch.full((11, 1), 1))] for r in range(3)]
    traffic = check(world, plan, calls)
    assert [t.sent for t in traffic] == [11, 0, 11] and traffic[1].kept == 11


def test_ranks_without_tokens_and_tokens_without_experts(world):
    plan = assignment(3, [0, 0, 2, 2])  # rank 1 has no expert
    nobody = replace(call(5, 0, 6, 4), experts=torch.full((6, 1), -1))
    traffic = check(world, plan, [[call(1, 0, 8, 4)], [call(2, 0, 0, 4)], [nobody]])
    assert traffic[1].sent == traffic[1].kept == traffic[2].sent == traffic[2].kept == 0


def test_nobody_has_anything_to_send(world):
    check(world, assignment(2, [0, 1]), [[call(1, 0, 0, 2)], [call(2, 0, 0, 2)]])


def test_tokens_of_replicas_stay_where_they_are(world):
    plan = assignment(3, [EVERYWHERE, 1, 2, EVERYWHERE])
    calls = [[call(r, 0, 40, 4, none=0)] for r in range(3)]
    traffic = check(world, plan, calls)
    for rank, (counted, (given,)) in enumerate(zip(traffic, calls, strict=True)):
        assert counted.kept == int(((given.experts % 3 == 0) | (given.experts == rank)).sum())
    assert check(world, assignment(3, [EVERYWHERE] * 4), calls)[0].sent == 0


def test_ranks_whose_batches_are_longer_go_on_while_the_others_serve(world):
    """As when batches generate: one takes one forward, another three, and one has no batch at all."""
    plan = assignment(3, [0, 1, 2], [2, 0, 1])
    calls = [[call(r * 10 + i, i % 2, 5 + i, 3) for i in range(length)] for r, length in enumerate((2, 6, 0))]
    traffic = check(world, plan, calls)
    assert {t.rounds for t in traffic} == {7}  # the longest, and a last one in which all say that they have ended


def test_ranks_may_be_in_different_layers(world):
    plan = assignment(3, [0, 1, 2, 0], [2, 0, 1, 0])
    check(world, plan, [[call(1, 0, 9, 4), call(2, 1, 9, 4)], [call(3, 1, 12, 4)], [call(4, 1, 4, 4), call(5, 0, 7, 4)]])


def test_one_rank_is_a_group_too(world):
    assert check(world, assignment(1, [0, 0]), [[call(1, 0, 9, 2)]])[0].sent == 0


def lose(membership: Membership, leaves: bool) -> str:
    exchange = membership.join(CPU)
    given = call(1, 0, 4, 2, none=0)
    exchange.serves(0, lambda tokens, experts: tokens)
    try:
        if leaves:
            return "gone"
        exchange.round(given.layer, given.tokens, given.experts, given.weights)
        return "not noticed"
    except PeerLost as error:
        return str(error)
    finally:
        leave()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_has_gone_is_noticed_and_not_waited_for_in_vain(world, gone):
    place = MeetingPlace(assignment(2, [0, 1]), timeout_s=5)
    said = world(lose, [(place.membership(rank), rank == gone) for rank in range(2)])
    assert said[gone] == "gone" and said[1 - gone].startswith(f"rank {1 - gone} of 2: ")


def late(membership: Membership) -> str:
    import pipeline.parallel.membership as here

    patience, here.START_S = here.START_S, 1.0
    try:
        membership.join(CPU)
    except PeerLost as error:
        return str(error)
    finally:
        here.START_S = patience
        leave()
    return "met nobody"


def test_a_group_that_does_not_come_together_says_where_it_was_to_meet(world):
    place = MeetingPlace(assignment(2, [0, 1]), timeout_s=1)
    (said,) = world(late, [(place.membership(1),)])
    assert said.startswith("rank 1 found no group at 127.0.0.1:")


def test_a_group_meets_at_its_own_address_only():
    place = MeetingPlace(assignment(2, [0, 1]), timeout_s=1)
    port = f"{place.membership(0).port:04X}"
    for file, addresses in (("/proc/net/tcp", ["0100007F"]), ("/proc/net/tcp6", [])):
        entries = [line.split() for line in Path(file).read_text().splitlines()[1:]]
        listening = [entry[1].split(":") for entry in entries if entry[3] == "0A"]
        assert [address for address, its in listening if its == port] == addresses
