"""What every command that executes needs before it starts: rows, model, task, batches, and a budget that fits.

All that can be refused is refused here, before a weight is read or an actor started.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config import Config, StoreConfig
from pipeline.data import Batch, Row, make_batches, read_rows
from pipeline.device import ExecutorSpec
from pipeline.errors import ConfigError, ModelError
from pipeline.machine import cores, free_device_memory
from pipeline.models import ModelSpec, describe
from pipeline.predicting import stand_ins
from pipeline.predicting.place import choose_predictor_device, planned_stand_ins, slots_beside
from pipeline.predicting.rehearsal import ArenaModel
from pipeline.tasks.registry import Task, make_task
from predictor.registry import HashPredictor, PredictorSpec, check, make
from predictor.stand_ins import Plan
from predictor.traces import TOP_T
from store.arena import Arena
from store.errors import SpaceError
from store.layout import ArenaLayout
from store.load import routers_identity
from store.room import available_memory, free_bytes
from store.slots import parse_budget, parse_bytes
from store.weights import Weights

ACTIVATION_BYTES = 2**30
"""Left free on a GPU beside experts and backbone: activations, CUDA graphs, and what CUDA itself takes."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Prepared:
    """A run, ready to start.

    Attributes:
        identity: names data and model, and what else decides the answers; equal for copies of the same files.
        truncated: rows that were longer than `batch.max_tokens`.
        predictor_path: not relative: for processes that work elsewhere, and when this one's directory has been removed, as Ray
            removes a job's.
    """

    config: Config
    rows: list[Row]
    batches: list[Batch]
    truncated: int
    model: ModelSpec
    weights: Weights
    layout: ArenaLayout
    arena: Path
    task: Task
    device: str
    """As torch writes it: "cpu" or "cuda:0"."""
    slots: int
    predictor_device: str
    """As torch writes it; "executor": in the Executor's process."""
    stand_ins: Plan | None
    """What a rehearsal's stand-ins will be, if they are yet to be made."""
    stand_in_bytes: int
    """Those of a rehearsal, wherever they lie."""
    identity: str
    predictor_path: Path | None

    @property
    def budget_bytes(self) -> int:
        """The budget of one Executor, in whole slots."""
        return self.slots * self.layout.slot_bytes

    def executor_spec(self, background: bool = True) -> ExecutorSpec:
        """Leaves one core to the Predictor if there is another; the Executors share the rest."""
        threads = max(1, (cores() - 1) // self.config.executors)
        store, top_t = self.config.store, TOP_T if self.config.trace.save is not None else None
        spec = ExecutorSpec(self.model, self.task, self.arena, self.slots, store.policy, self.device, threads, background)
        return replace(spec, read_ahead=store.backing == "file", top_t=top_t)

    def predictor_spec(self, identity: str, made: Path | None = None) -> PredictorSpec:
        """
        Args:
            identity: of the model's routers, which the arena knows.
            made: the stand-ins that were made for a rehearsal.
        """
        config = self.config.predictor
        path = made or self.predictor_path
        device = self.device if self.predictor_device == "executor" else self.predictor_device
        shape, seed = self.model.shape, self.config.seed
        return PredictorSpec(config.kind, path, config.named(shape.top_k), shape, identity, seed, config.mass, self.slots, device)


def prepare(config: Config) -> Prepared:
    """
    Raises:
        One of USER_ERRORS: whatever in data, model or budget cannot work.
    """
    rows = read_rows(config.data, config.labels)
    device = choose_device(config.device)
    model, weights = describe(config.model, torch.device(device))
    layout = model.placement.layout(weights)
    directory = arena_directory(config.store)
    arena = model.placement.arena_path(weights, directory)
    in_memory = 0 if arena.exists() else layout.nbytes
    free = free_bytes(directory)
    if in_memory > free:
        raise SpaceError(
            f"store.directory: {directory}: the arena needs {layout.nbytes} bytes, {free} are free: {in_memory - free} bytes "
            "short; name a larger filesystem, or free some with `python runner.py clean`"
        )
    free = free_for_experts(device, layout, in_memory if config.store.backing == "shm" else 0)
    if device == "cpu":  # all of them take of one memory
        free //= config.executors
    predictor_device = choose_predictor_device(config, device)
    shares = predictor_device == "executor"  # all that stands for experts on the Executor's device counts
    beside = parse_bytes(config.store.budget, layout.expert_bytes, free, "store.budget") if shares else None
    plan, stand_in_bytes = planned_stand_ins(config, layout, beside)
    slots = parse_budget(config.store.budget, layout.expert_bytes, layout.slot_bytes, free)
    if shares:
        slots = slots_beside(stand_in_bytes, config.store.budget, layout, free)
    tokenizer = load_tokenizer(model.tokenizer)
    task = make_task(config, model, tokenizer)
    encoded, truncated = task.encode(tokenizer, rows, config.batch.max_tokens)
    largest = max(int(ids.max(initial=0)) for row in encoded for ids in row.streams)
    if largest >= model.shape.vocab_size:
        raise ModelError(
            f"{model.tokenizer}: the tokenizer gives token id {largest}, {model.source} has a vocabulary of "
            f"{model.shape.vocab_size}: they do not belong together"
        )
    batches = make_batches(encoded, config.batch)
    digest = hashlib.sha256(weights.sample().encode())  # not the arena's name: a resubmitted job has new copies of the files
    decisive = {key: value for key, value in model.config.items() if key not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(decisive, sort_keys=True).encode())  # a router's capacity is no weight, and decides answers
    if config.routing == "hash" and config.predictor.path and Path(config.predictor.path).is_file():
        digest.update(Path(config.predictor.path).read_bytes())  # there the tables decide the answers
    if config.routing == "hash" and plan is not None:
        digest.update(f"{plan.method} {plan.size}".encode())
    for row in encoded:
        for ids in (*row.streams, *(() if row.target is None else (row.target,))):
            digest.update(ids.tobytes() + b"|")
    identity = digest.hexdigest()[:16]
    return Prepared(
        config,
        rows,
        batches,
        truncated,
        model,
        weights,
        layout,
        arena,
        task,
        device,
        slots,
        predictor_device,
        plan,
        stand_in_bytes,
        identity,
        Path(config.predictor.path).absolute() if config.predictor.path else None,
    )


def choose_device(wanted: str) -> str:
    """What `device` means on this machine, as torch writes it.

    Raises:
        ConfigError: a GPU is wanted, and there is none.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError("device: cuda, but torch finds no GPU; write `device: cpu`, or install a torch built for CUDA")
    return "cuda:0"


def free_for_experts(device: str, layout: ArenaLayout, in_memory: int) -> int:
    """Bytes on the device that a budget may take.

    Args:
        in_memory: bytes of RAM that the arena has still to take.
    """
    if device == "cpu":
        return max(0, available_memory() - in_memory)
    return max(0, (free_device_memory() or 0) - layout.backbone_bytes - ACTIVATION_BYTES)


def arena_directory(config: StoreConfig) -> Path:
    """Where the arena goes; the default one on a disk is made.

    Raises:
        ConfigError: a file cannot back an arena here.
        SpaceError: no such directory.
    """
    directory = config.arena_directory
    if config.backing == "file" and Path(os.path.realpath(directory)).is_relative_to("/dev/shm"):
        raise ConfigError(f"store.backing: file, but store.directory is {directory}, which is RAM; name a directory on a disk")
    if config.directory is None and config.backing == "file":
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpaceError(f"store.directory: {directory}: {error.strerror}") from None
    if not directory.is_dir():
        raise SpaceError(f"store.directory: {directory}: no such directory")
    return directory


def check_predictor(prepared: Prepared) -> None:
    """
    Raises:
        PredictorError: the predictor's file is missing, damaged, or made for another model.
    """
    if prepared.stand_ins is None:
        check(prepared.predictor_spec(routers_identity(prepared.weights, prepared.model.placement)))


def made_stand_ins(prepared: Prepared) -> Path | None:
    """The file of a rehearsal's stand-ins, made of the arena's experts if need be; None: the config names one, or needs none."""
    if prepared.stand_ins is None:
        return None
    arena = Arena.attach(prepared.arena)
    assert arena is not None, "the store keeps it"
    try:
        return stand_ins.cached(prepared.stand_ins, arena, prepared.device)
    finally:
        arena.close()


def own_predictor(prepared: Prepared, identity: str) -> HashPredictor:
    """The config's predictor in this process, on the arena of a store that is open."""
    model = ArenaModel(prepared.model, prepared.arena)
    return make(prepared.predictor_spec(identity, made_stand_ins(prepared)), model)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """
    Raises:
        ModelError: no tokenizer there, or a damaged one.
    """
    if not any((directory / name).exists() for name in TOKENIZER_FILES):  # transformers would make one that knows no word
        raise ModelError(f"{directory}: no usable tokenizer: holds none of {', '.join(TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # a damaged file can raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"{directory}: no usable tokenizer: {reason}") from None
