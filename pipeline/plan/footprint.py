"""What a model takes and what a machine has, in bytes, before a weight is read: which of it fits where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.machine import free_device_memory
from pipeline.models import ModelSpec, describe
from pipeline.prepare import ACTIVATION_BYTES, arena_directory, choose_device, free_for_experts
from store.layout import ArenaLayout
from store.room import available_memory, free_bytes
from store.slots import parse_budget


@dataclass(frozen=True)
class Footprint:
    """A model on this machine.

    Attributes:
        device_free, host_free, directory_free: bytes free now: on the device (the host, for a CPU), in RAM, in store.directory.
        arena_there: it lies in store.directory already and takes nothing more.
        free: bytes on the device that a budget may take, backbone and working memory set aside.
    """

    model: ModelSpec
    layout: ArenaLayout
    device: str
    directory: Path
    arena_there: bool
    device_free: int
    host_free: int
    directory_free: int
    free: int

    @property
    def arena_fits(self) -> bool:
        return self.arena_there or self.layout.nbytes <= self.directory_free

    @property
    def experts_fit(self) -> bool:
        """All of them, on the device."""
        return self.layout.expert_bytes <= self.free

    @property
    def experts(self) -> int:
        return sum(self.model.shape.experts)

    def slots(self, budget: str, key: str) -> int:
        """How many a budget buys, whether or not they are free.

        Raises:
            SpaceError: it is no budget.
        """
        return parse_budget(budget, self.layout.expert_bytes, self.layout.slot_bytes, 2**62, key)

    def auto(self) -> tuple[str, str]:
        """The budget that `auto` takes, as it would be written, and why."""
        slots = parse_budget("auto", self.layout.expert_bytes, self.layout.slot_bytes, self.free)
        free, all_bytes = gb(self.free), gb(self.layout.expert_bytes)
        if slots >= self.layout.expert_bytes // self.layout.slot_bytes:
            return "100%", f"all experts, {all_bytes}, are less than nine tenths of the {free} that are free for them"
        why = f"nine tenths of the {free} that are free for experts; all of them are {all_bytes}"
        return f"{slots * self.layout.slot_bytes}B", f"{why}, so {slots} of {self.experts} fit"

    def sentences(self) -> list[str]:
        """What there is and what fits, for people."""
        layout, shape = self.layout, self.model.shape
        where = "this CPU's RAM" if self.device == "cpu" else "the GPU"
        lines = [
            f"{self.model.source} in {self.model.dtype}: {self.experts} experts in {shape.layers} MoE layers, "
            f"{gb(layout.expert_bytes)}, up to {gb(layout.slot_bytes)} each; backbone {gb(layout.backbone_bytes)}; "
            f"arena {gb(layout.nbytes)}",
            f"free: {gb(self.device_free)} on the device ({where}), {gb(self.host_free)} of RAM, "
            f"{gb(self.directory_free)} in {self.directory}",
        ]
        if self.arena_there:
            lines.append(f"the arena lies in {self.directory} already")
        elif self.arena_fits:
            lines.append(f"the arena fits {self.directory}")
        else:
            short = layout.nbytes - self.directory_free
            lines.append(f"the arena does not fit {self.directory}: {short} bytes short; name a larger one in store.directory")
        if self.device != "cpu" and layout.backbone_bytes + ACTIVATION_BYTES > self.device_free:
            lines.append("the backbone and working memory alone do not fit the device: no budget will help")
        elif self.experts_fit:
            lines.append("all experts fit the device: offloading is pointless here, unless the memory is wanted for something else")
        else:
            share = self.free / layout.expert_bytes
            lines.append(f"{share:.0%} of the experts' bytes fit the device beside the backbone: the rest moves when it is needed")
        return lines


def footprint(config: Config) -> Footprint:
    """
    Raises:
        ConfigError, ModelError, CheckpointError, SpaceError: what cannot be found or read.
    """
    device = choose_device(config.device)
    model, headers = describe(config.model, torch.device(device), only_headers=True)
    layout = model.placement.layout(headers)
    directory = arena_directory(config.store)
    there = model.placement.arena_path(headers, directory).exists()
    host = available_memory()
    on_device = host if device == "cpu" else free_device_memory() or 0
    free = free_for_experts(device, layout, 0 if there or config.store.backing == "file" else layout.nbytes)
    return Footprint(model, layout, device, directory, there, on_device, host, free_bytes(directory), free)


def gb(nbytes: float) -> str:
    """Bytes for people, to three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}" if nbytes < 1000 * size else f"{nbytes / size:,.0f} {unit}"
    return f"{nbytes:.0f} B"
