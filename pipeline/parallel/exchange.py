"""Tokens to the owners of their experts and back, between the ranks of a group: sizes first, then tokens, nothing padded.

Dynamic gating across devices, as in "Towards MoE Deployment" (section 4). Every rank runs a batch of its own, and the group goes
from round to round. In a round each rank that has come to a MoE layer sends its tokens to the ranks that own their experts,
computes what it is sent, and gets its own back. A rank without a batch, or with one that has ended, takes part with nothing to
send, until all have ended: batches may be of any length, and those that generate may stop at different steps.

What a rank tells another in a round: the MoE layer it is in, or `ENDED`, what a token is, and how many come for each expert. Sizes
are read on the host: the one question that a layer asks a GPU. Tokens travel as bytes, with gloo as with NCCL.

Knows no slots and no models: who computes is told by `serves`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.parallel.placement import EVERYWHERE, Assignment

ENDED = -1
"""In place of a MoE layer: the rank's batch has ended."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of tokens, by the number that travels."""

HEADER = 3
"""Numbers before the counts: MoE layer, d_model, dtype."""

Serve = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From tokens (n, d_model), n > 0, and the expert of each, int64 (n,): what these make of them, unweighted, (n, d_model)."""


class PeerLost(RuntimeError):
    """A rank of the group has gone, or does not answer."""


@dataclass
class Traffic:
    """What one rank has sent, counted in token-expert pairs."""

    rounds: int = 0
    sent: int = 0
    """To other ranks."""
    kept: int = 0
    """The expert was here."""


@dataclass(frozen=True)
class Sizes:
    """What goes and comes in a round.

    Attributes:
        sent, received: token-expert pairs, by rank.
        layers: the MoE layer that each rank is in, or `ENDED`.
        counts: of what is received, int64 (ranks, experts of the widest layer), on the device.
        d_model, dtype: of a token that is received.
    """

    sent: list[int]
    received: list[int]
    layers: list[int]
    counts: torch.Tensor
    d_model: int
    dtype: torch.dtype


class Exchange:
    """One rank's end. For one thread at a time, in which the rank's rounds follow one another."""

    def __init__(self, rank: int, assignment: Assignment, device: torch.device):
        """Torch's default process group must have `assignment.devices` ranks, and this be its `rank`."""
        owners, self._ranks, self._rank = assignment.owners, assignment.devices, rank
        self._width = width = max(map(len, owners))
        self._device = device
        # Per MoE layer: an expert -> its place among all, those of one destination together. The last entry is that of no expert.
        place = torch.full((len(owners), width + 1), width, dtype=torch.int64)
        going = torch.zeros(len(owners), self._ranks, width, dtype=torch.int64)  # 1 at an expert's destination
        for layer, owner in enumerate(owners):
            to = torch.from_numpy(owner).long()
            to = torch.where(to == EVERYWHERE, rank, to)
            place[layer, to.argsort(stable=True)] = torch.arange(len(owner))
            going[layer, to, torch.arange(len(owner))] = 1
        self._place, self._going = place.to(device), going.to(device)
        self._experts = torch.arange(width, device=device).repeat(self._ranks)
        self._serve: dict[int, Serve] = {}
        self.traffic = Traffic()

    def serves(self, layer: int, serve: Serve) -> None:
        """Who computes a MoE layer's experts here."""
        self._serve[layer] = serve

    def round(self, layer: int, tokens: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What a MoE layer's experts, wherever they are, make of this rank's tokens. The other ranks must take part.

        Args:
            tokens: (tokens, d_model).
            experts: int64 (tokens, top_k); -1 is none.
            weights: (tokens, top_k), multiplied with the experts' outputs.

        Returns:
            (tokens, d_model), the sum over a token's experts; zero for a token without.

        Raises:
            PeerLost: another rank does not take part.
        """
        top_k, pairs = experts.shape[1], experts.reshape(-1)
        order = self._place[layer][pairs].argsort(stable=True)
        counts = torch.zeros(self._width + 1, dtype=torch.int64, device=self._device)
        counts.scatter_add_(0, torch.where(pairs < 0, self._width, pairs), torch.ones_like(pairs))
        header = torch.tensor([layer, tokens.shape[1], DTYPES.index(tokens.dtype)])
        sizes = self._sizes(header, self._going[layer] * counts[:-1])
        order = order[: sum(sizes.sent)]
        self.traffic.kept += sizes.sent[self._rank]
        self.traffic.sent += len(order) - sizes.sent[self._rank]
        back = self._there_and_back(tokens[order // top_k], sizes)
        # As transformers adds up: products in the wider dtype of both, a sum over a token's experts in their order, then rounded.
        products = torch.zeros(
            len(pairs), tokens.shape[1], dtype=torch.promote_types(tokens.dtype, weights.dtype), device=self._device
        )
        products[order] = (back * weights.reshape(-1)[order, None]).to(products.dtype)
        return products.view(-1, top_k, tokens.shape[1]).sum(dim=1).to(tokens.dtype)

    def end(self) -> None:
        """Takes part, with nothing to send, until every rank's batch has ended.

        Raises:
            PeerLost: another rank does not take part.
        """
        nothing = torch.zeros(self._ranks, self._width, dtype=torch.int64, device=self._device)
        while True:
            sizes = self._sizes(torch.tensor([ENDED, 0, 0]), nothing)
            if all(layer == ENDED for layer in sizes.layers):
                return
            self._there_and_back(torch.empty(0, sizes.d_model, dtype=sizes.dtype, device=self._device), sizes)

    def _sizes(self, header: torch.Tensor, counts: torch.Tensor) -> Sizes:
        """counts: what goes, int64 (ranks, experts of the widest layer)."""
        self.traffic.rounds += 1
        going = torch.cat([header.to(self._device, non_blocking=True).expand(self._ranks, HEADER), counts], dim=1)
        coming = torch.empty_like(going)
        self._all_to_all(coming, going, None, None)
        sums = torch.stack([going[:, HEADER:].sum(dim=1), coming[:, HEADER:].sum(dim=1)], dim=1)
        rows = torch.cat([coming[:, :HEADER], sums], dim=1).tolist()  # here the host waits for the device
        layers, d_models, dtypes, sent, received = (list(column) for column in zip(*rows, strict=True))
        return Sizes(sent, received, layers, coming[:, HEADER:], max(d_models), DTYPES[max(dtypes)])

    def _there_and_back(self, tokens: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """
        Args:
            tokens: (sum of `sizes.sent`, d_model), by destination and then by expert.
        """
        arrived = torch.empty(sum(sizes.received), sizes.d_model, dtype=sizes.dtype, device=self._device)
        self._all_to_all(arrived.view(torch.uint8), tokens.view(torch.uint8), sizes.received, sizes.sent)
        results = self._compute(arrived, sizes)
        back = torch.empty_like(tokens)
        self._all_to_all(back.view(torch.uint8), results.view(torch.uint8), sizes.sent, sizes.received)
        return back

    def _compute(self, tokens: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """The results of all that has arrived, in its order."""
        if not len(tokens):
            return tokens
        experts = self._experts.repeat_interleave(sizes.counts.reshape(-1), output_size=len(tokens))
        layers = {layer for layer, count in zip(sizes.layers, sizes.received, strict=True) if count}
        if len(layers) == 1:
            return self._serve[layers.pop()](tokens, experts).to(tokens.dtype)
        results = torch.empty_like(tokens)  # ranks are in different layers: one has gone on to its next forward, another has not
        of = torch.tensor(sizes.layers).repeat_interleave(torch.tensor(sizes.received)).to(self._device)
        for layer in sorted(layers):
            mine = (of == layer).nonzero()[:, 0]
            results[mine] = self._serve[layer](tokens[mine], experts[mine]).to(tokens.dtype)
        return results

    def _all_to_all(self, to: torch.Tensor, of: torch.Tensor, sizes_to: list[int] | None, sizes_of: list[int] | None) -> None:
        try:
            dist.all_to_all_single(to, of, sizes_to, sizes_of)
        except RuntimeError as error:
            raise PeerLost(f"rank {self._rank} of {self._ranks}: {str(error).splitlines()[0]}") from error
