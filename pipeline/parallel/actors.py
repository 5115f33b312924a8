"""Ranks as Ray actors on one machine, each with a GPU of its own where it runs on one.

Ray starts none of them again by itself, nor repeats a call: a new process is in no group. `pipeline.parallel.group.Group` does
both, for all ranks at once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.actors import Actors, result
from pipeline.batch_result import BatchResult, BatchStats
from pipeline.data import Batch
from pipeline.device import ExecutorSpec
from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.losses import Loss, Told
from pipeline.parallel.exchange import PeerLost
from pipeline.parallel.group import AHEAD, Group, GroupLost, Step
from pipeline.parallel.load import Balance, counted
from pipeline.parallel.membership import START_S, MeetingPlace
from pipeline.parallel.placement import Assignment
from pipeline.parallel.rank import Rank
from pipeline.parallel.sharing import share_out
from pipeline.prepare import Prepared
from predictor.actor import Prediction


class ExecutorRank(Rank):
    """A rank that answers Ray's calls."""

    def take_part(self, batch: Batch, routing: str, *predictions: Prediction | None) -> BatchResult:
        """`step`, and waits for it."""
        return self.step(batch, routing, *predictions).result()


class RankActors:
    """See `pipeline.parallel.group.Ranks`."""

    def __init__(self, spec: ExecutorSpec, assignment: Assignment, timeout_s: float):
        """Starts one actor per rank, on this machine as the arena is, and waits until all can work.

        Args:
            timeout_s: a rank that does not answer for so long is taken for lost.

        Raises:
            GroupLost: a rank has died.
            One of USER_ERRORS: a rank cannot stand.
        """
        self._timeout_s = timeout_s
        self._place = MeetingPlace(assignment, timeout_s)
        here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {} if spec.device == "cpu" else {"num_gpus": 1}
        options |= {"num_cpus": 0, "max_restarts": 0, "max_concurrency": AHEAD + 2, "scheduling_strategy": here}
        make, own = ray.remote(**options)(ExecutorRank), replace(spec, alone=True)
        self._actors: list[Any] = [make.remote(own, self._place.membership(rank)) for rank in range(assignment.devices)]
        self._asked: deque[list[ray.ObjectRef]] = deque()
        try:
            _all([actor.ready.remote() for actor in self._actors], START_S)
        except BaseException:
            self.stop()
            raise

    def submit(self, step: Step) -> None:
        calls = zip(self._actors, step.calls(len(self._actors)), strict=True)
        self._asked.append([actor.take_part.remote(*call) for actor, call in calls])

    def answer(self) -> list[BatchResult]:
        return _all(self._asked.popleft(), self._timeout_s)

    def close(self) -> None:
        """Lets every rank give up what it has, and ends it."""
        with contextlib.suppress(GroupLost):
            _all([actor.close.remote() for actor in self._actors], self._timeout_s)
        self.stop()

    def stop(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor)


class SharedExperts:
    """A run's group: its ranks as its config says, and what makes tables for them."""

    def __init__(self, prepared: Prepared, actors: Actors, identity: str, lost: Told):
        """Says how experts are shared out, and waits for the ranks.

        Args:
            actors: makes tables.
            identity: of the model's routers, which the arena knows.
            lost: told when a rank's death has ended all of them.

        Raises:
            ConfigError: GPUs are wanted that Ray does not have.
        """
        config, spec = prepared.config, prepared.executor_spec()
        self._prepared, self._actors = prepared, actors
        free = int(ray.available_resources().get("GPU", 0))
        if spec.device != "cpu" and config.executors > free:
            raise ConfigError(
                f"executors: {config.executors} take a GPU each, and this Ray has {free or 'none'} to give; write `device: cpu`, "
                f"or start it with `ray start --num-gpus {config.executors}`"
            )
        plan = share_out(prepared, identity, lambda tokens: result(actors.predict(tokens)).table)
        fits = "all of them in slots" if plan.most <= prepared.slots else f"through {prepared.slots} slots"
        print(
            f"each expert belongs to one of {config.executors} Executors ({config.parallel.placement}): {plan.most} at most, {fits}"
        )

        def told(batches: int) -> None:
            lost(Loss("executor", "a rank, and all others with it", redone=batches))

        self._group = Group(lambda: RankActors(spec, plan, config.parallel.timeout_s), plan, told)

    def run(self, work: Iterable[tuple[Batch, Prediction | None]], routing: str) -> Iterator[BatchResult]:
        """See `Group.run`; batches without a prediction are predicted on their way."""
        asked = ((batch, prediction or self._actors.predict(batch.tokens)) for batch, prediction in work)
        return self._group.run(asked, routing)

    def metrics(self, stats: list[BatchStats]) -> dict[str, Any]:
        """How evenly experts were shared out, as far as routers were asked beside tables."""
        plan, seen = self._group.plan, [s.load for s in stats if s.load]
        balance = asdict(Balance.of(counted(seen, self._prepared.model.shape), plan)) if seen else {}
        placement = self._prepared.config.parallel.placement
        return {"placement": placement, "most_experts": plan.most, "restarts": self._group.restarts} | balance

    def close(self) -> None:
        """Lets the ranks give up what they have, and ends them."""
        self._group.close()

    def stop(self) -> None:
        """Ends the ranks, whatever they are doing."""
        self._group.stop()


def _all(refs: list[ray.ObjectRef], timeout_s: float) -> list[Any]:
    """What all of them have to say; the first error ends the waiting, since the others would wait in vain."""
    left = refs
    while left:
        ready, left = ray.wait(left, timeout=timeout_s)
        if not ready:
            raise GroupLost(f"{len(left)} of {len(refs)} ranks have said nothing for {timeout_s:g} s")
        try:
            ray.get(ready, timeout=timeout_s)
        except (RayActorError, GetTimeoutError) as error:
            raise GroupLost(" ".join(str(error).split())) from error
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, PeerLost):
                raise GroupLost(str(cause)) from error
            if isinstance(cause, USER_ERRORS):
                raise cause from None
            raise
    return ray.get(refs)
