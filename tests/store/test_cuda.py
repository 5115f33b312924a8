"""CUDA's driver on a real GPU: registered memory, copies and stores by address, events, and the lanes made of them."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from store import cuda, ring
from store.arena import Arena, build
from store.device_copies import DeviceCopyEngine
from store.eviction import POLICIES
from store.lanes import CudaLanes, PointerTable
from store.layout import ArenaLayout
from store.slots import Slots

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda:0")
SLEEP = 100_000_000
"""Cycles: some 50 ms, in which a CPU does all that a test gives a stream."""


@triton.jit
def _read(address, target, words, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = address.to(tl.pointer_type(tl.int32)) + i
    tl.store(target + i, tl.load(here, mask=i < words), mask=i < words)


def read_in_place(address: int, nbytes: int) -> torch.Tensor:
    """What a kernel finds at an address, uint8 (nbytes,), on the CPU; whole words."""
    target = torch.zeros(nbytes // 4, dtype=torch.int32, device=DEVICE)
    _read[(triton.cdiv(nbytes // 4, 1024),)](address, target, nbytes // 4, BLOCK=1024)
    return target.view(torch.uint8).cpu()


def copied(address: int, nbytes: int) -> torch.Tensor:
    """What a copy brings, uint8 (nbytes,), on the CPU."""
    target = torch.full((nbytes,), 0xAA, dtype=torch.uint8, device=DEVICE)
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream())
    cuda.copy_to_device(target.data_ptr(), address, nbytes, stream.cuda_stream)
    stream.synchronize()
    return target.cpu()


@pytest.fixture(autouse=True)
def usable() -> Iterator[None]:
    """A context is current; and after each test torch still computes: no error was left for it to find."""
    torch.cuda.init()
    assert torch.ones(3, device=DEVICE).sum().item() == 3
    yield
    torch.cuda.synchronize()
    assert torch.ones(3, device=DEVICE).sum().item() == 3


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="test-cuda-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def memory(shm) -> torch.Tensor:
    """4 MiB and a bit of a file of mode 0400 in shared memory, mapped read-only: uint8."""
    content = torch.randint(256, (2**22 + 1204,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = shm / "file"
    path.write_bytes(content.numpy().tobytes())
    path.chmod(0o400)
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
    os.close(fd)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is read-only, and torch cannot say so
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
    assert torch.equal(memory, content)
    return memory


@contextmanager
def registered(memory: torch.Tensor, **options) -> Iterator[int]:
    """Its address on the device."""
    there = cuda.register(memory.data_ptr(), memory.numel(), 0, **options)
    try:
        yield there
    finally:
        torch.cuda.synchronize()
        cuda.unregister(memory.data_ptr())


# Registration


@pytest.mark.parametrize("start", [0, 4096, 3 * 4096])
def test_a_read_only_mapping_is_copied_from_and_read_in_place(memory, start):
    part = memory[start:]
    with registered(part) as there:
        assert torch.equal(copied(part.data_ptr(), part.numel()), part)
        assert torch.equal(read_in_place(there, part.numel()), part)
        for offset, nbytes in ((256, 4096), (2**20 + 512, 4), (part.numel() - 1204, 1204)):  # and pieces of it
            assert torch.equal(copied(part.data_ptr() + offset, nbytes), part[offset:][:nbytes])
            assert torch.equal(read_in_place(there + offset, nbytes), part[offset:][:nbytes])


def test_copies_from_registered_memory_return_before_they_are_done(memory):
    """From memory that is not, this would wait for the stream: one thread could not keep two lanes busy."""
    target = torch.zeros(memory.numel(), dtype=torch.uint8, device=DEVICE)
    stream, done = torch.cuda.Stream(DEVICE), torch.cuda.Event()
    torch.cuda.synchronize()
    with registered(memory):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP)
        cuda.copy_to_device(target.data_ptr(), memory.data_ptr(), memory.numel(), stream.cuda_stream)
        done.record(stream)
        assert not done.query()
        done.synchronize()
    assert torch.equal(target.cpu(), memory)


def test_what_is_registered_cannot_be_registered_again(memory):
    with registered(memory) as there:
        for part, reason in ((memory, r"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED \(\d+\)"), (memory[4096:8192], "CUDA_ERROR_")):
            with pytest.raises(cuda.CudaError, match=f"cuMemHostRegister_v2: {reason}"):
                cuda.register(part.data_ptr(), part.numel(), 0)
            assert torch.ones(3, device=DEVICE).sum().item() == 3
        assert torch.equal(read_in_place(there, memory.numel()), memory), "the first registration stands"


def test_two_mappings_of_one_file_are_registered_side_by_side(memory, shm):
    with (shm / "file").open("rb") as file:
        again = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        other = torch.frombuffer(again, dtype=torch.uint8)
    with registered(memory):
        with registered(other) as there:
            assert torch.equal(read_in_place(there, other.numel()), memory)
        assert torch.equal(copied(memory.data_ptr(), memory.numel()), memory)


def test_a_read_only_mapping_is_refused_as_one_that_is_not(memory):
    with pytest.raises(cuda.CudaError, match=r"cuMemHostRegister_v2: CUDA_ERROR_"):
        cuda.register(memory.data_ptr(), memory.numel(), 0, read_only=False)
    assert torch.ones(3, device=DEVICE).sum().item() == 3
    with registered(memory) as there:
        assert torch.equal(read_in_place(there, memory.numel()), memory)


def test_memory_that_can_be_written_is_read_as_it_is_now():
    mapped = mmap.mmap(-1, 2**16)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    with registered(memory, read_only=False) as there:
        for value in (1, 2):
            memory.fill_(value)
            assert (read_in_place(there, 2**16) == value).all()
            assert (copied(memory.data_ptr(), 2**16) == value).all()


def test_what_is_no_memory_is_refused(memory):
    mapped = mmap.mmap(-1, 2**16)
    unmapped = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    mapped.close()
    for address, nbytes in ((memory.data_ptr(), 0), (0, 4096), (unmapped, 2**16)):
        with pytest.raises(cuda.CudaError, match=r"cuMemHostRegister_v2: CUDA_ERROR_"):
            cuda.register(address, nbytes, 0)
        assert torch.ones(3, device=DEVICE).sum().item() == 3


def test_after_unregistering_nothing_is_left(memory):
    with registered(memory):
        pass
    with pytest.raises(cuda.CudaError, match="cuMemHostUnregister: CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"):
        cuda.unregister(memory.data_ptr())
    assert torch.ones(3, device=DEVICE).sum().item() == 3
    try:
        bytes_ = copied(memory.data_ptr(), memory.numel())
    except cuda.CudaError:
        pass  # it may be refused; it may not be wrong
    else:
        assert torch.equal(bytes_, memory)
    with registered(memory) as there:  # as new
        assert torch.equal(read_in_place(there, memory.numel()), memory)
        assert torch.equal(copied(memory.data_ptr(), memory.numel()), memory)


# Streams


def test_a_store_writes_one_value_in_the_order_of_its_stream():
    before, first, second = -1, 0x7F12_3456_789A_BC00, 3
    cells = torch.full((3,), before, dtype=torch.int64, device=DEVICE)
    seen = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    stream, done = torch.cuda.Stream(DEVICE), torch.cuda.Event()
    cells.clone()  # loads what is needed for it
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        cuda.store(cells[1].data_ptr(), first, stream.cuda_stream)
        seen[0].copy_(cells)
        cuda.store(cells[1].data_ptr(), second, stream.cuda_stream)
        seen[1].copy_(cells)
        done.record(stream)
    now = cells.clone()  # on another stream
    torch.cuda.current_stream().synchronize()
    assert not done.query(), "the GPU slept too short to tell"
    assert now.tolist() == [before] * 3
    done.synchronize()
    assert seen.tolist() == [[before, first, before], [before, second, before]]


def test_a_store_comes_after_the_copy_before_it(memory):
    """As an entry of the pointer table comes after the expert: whoever sees the one sees the other."""
    flag, target = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros_like(memory, device=DEVICE)
    copying, looking = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    with registered(memory):
        for turn in range(1, 21):
            target.zero_()
            torch.cuda.synchronize()
            cuda.copy_to_device(target.data_ptr(), memory.data_ptr(), memory.numel(), copying.cuda_stream)
            cuda.store(flag.data_ptr(), turn, copying.cuda_stream)
            with torch.cuda.stream(looking):
                deadline = time.monotonic() + 10
                while flag.item() != turn:
                    assert time.monotonic() < deadline
                assert torch.equal(target.cpu(), memory)


def test_a_stream_waits_for_an_event_of_another_although_the_event_is_dropped():
    cell, seen = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    one, other = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    for turn in range(1, 4):
        torch.cuda.synchronize()
        with torch.cuda.stream(one):
            torch.cuda._sleep(SLEEP)
            cuda.store(cell.data_ptr(), turn, one.cuda_stream)
        cuda.wait(other.cuda_stream, cuda.Event(one.cuda_stream))
        with torch.cuda.stream(other):
            seen.copy_(cell)
        other.synchronize()
        assert seen.item() == turn


def test_an_event_is_a_point_in_time_and_can_be_waited_for():
    stream = torch.cuda.Stream(DEVICE)
    cell = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    first = cuda.Event(stream.cuda_stream)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
    cuda.store(cell.data_ptr(), 1, stream.cuda_stream)
    second = cuda.Event(stream.cuda_stream)
    second.synchronize()
    assert cell.item() == 1
    assert 5 < first.ms_until(second) < 10_000
    assert second.ms_until(first) == pytest.approx(-first.ms_until(second))


# Lanes


@pytest.fixture
def arena(shm) -> Iterator[Arena]:
    """Two MoE layers, of six experts of 64 KiB and of four of 1 MiB; random."""
    layout = ArenaLayout.of([(6, {"w": ((2**16,), "uint8")}), (4, {"w": ((2**20,), "uint8")})], {})
    generator = torch.Generator().manual_seed(0)
    arena = build(shm / "a", layout, "", lambda to: to.copy_(torch.randint(256, to.shape, dtype=torch.uint8, generator=generator)))
    with registered(arena.memory):
        yield arena
    arena.close()


def make_lanes(arena: Arena, count: int) -> tuple[Slots, PointerTable, CudaLanes, torch.cuda.Stream]:
    compute = torch.cuda.Stream(DEVICE)
    slots = Slots(arena, count, DEVICE)
    slots.memory.fill_(255)
    table = PointerTable(arena, arena.memory.data_ptr(), DEVICE)  # one address for both, as wherever CUDA runs on Linux
    torch.cuda.synchronize()
    return slots, table, CudaLanes(arena, slots, table, compute), compute


def test_a_filled_slot_is_pointed_to_and_a_withdrawn_expert_is_read_in_place(arena):
    slots, table, lanes, compute = make_lanes(arena, 2)
    for key in ((0, 5), (1, 3), (0, 0)):
        block = arena.block(*key)
        assert torch.equal(read_in_place(int(table.entries[key]), block.numel()), block)
        mark = lanes.fill(key, 1)
        mark.wait()
        begin, end = mark.span()
        assert begin <= end
        assert int(table.entries[key]) == slots.address(1)
        assert torch.equal(read_in_place(int(table.entries[key]), block.numel()), block)
        lanes.withdraw(key)
        compute.synchronize()
        assert int(table.entries[key]) == table.host_address(key)
    assert (slots.memory[: arena.layout.slot_bytes] == 255).all(), "the other slot was not asked for"


@pytest.mark.parametrize("device", [DEVICE, None])
def test_what_is_not_registered_comes_in_chunks_through_a_ring_and_is_nowhere_before_and_after(arena, monkeypatch, device):
    """Slots on the device, or in pinned host memory."""
    monkeypatch.setattr(ring, "CHUNK_BYTES", 192 * 1024 + 256)
    slots, compute = Slots(arena, 2, device), torch.cuda.Stream(DEVICE)
    table = PointerTable(arena, None, DEVICE)
    lanes = ring.CudaRingLanes(arena, slots, table, compute)
    assert not table.entries.any()
    keys = [(0, 5), (1, 3), (0, 0), (1, 1), (0, 2), (1, 0)]
    for turn, key in enumerate(keys):
        block, slot = arena.block(*key), turn % 2
        with torch.cuda.stream(compute):
            torch.cuda._sleep(SLEEP // 8)
        if turn >= 2:
            lanes.withdraw(keys[turn - 2])
        mark = lanes.fill(key, slot)
        assert not mark.is_reached()
        mark.wait()
        begin, end = mark.span()
        assert begin <= end
        assert int(table.entries[key]) == slots.address(slot)
        assert torch.equal(read_in_place(slots.address(slot), block.numel()), block)
        assert turn < 2 or int(table.entries[keys[turn - 2]]) == 0


def test_a_slot_is_not_filled_again_before_the_kernels_that_read_it_are_through(arena):
    slots, _, lanes, compute = make_lanes(arena, 1)
    size = arena.layout.slot_bytes
    for turn in range(8):
        old, new = (1, turn % 4), (1, (turn + 1) % 4)
        lanes.fill(old, 0).wait()
        with torch.cuda.stream(compute):
            torch.cuda._sleep(SLEEP // 8)
            found = slots.memory.clone()  # a kernel that began when the expert was there
        lanes.withdraw(old)
        mark = lanes.fill(new, 0)
        mark.wait()
        compute.synchronize()
        assert torch.equal(slots.memory[:size].cpu(), arena.block(*new))
        assert torch.equal(found.cpu(), arena.block(*old))
        lanes.withdraw(new)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_engines_thread_brings_what_is_planned(arena, policy):
    """It is a thread of its own, which has to have a context as well."""
    slots, table, lanes, _ = make_lanes(arena, 3)
    engine = DeviceCopyEngine(arena, slots, POLICIES[policy](), lanes)
    engine.start()
    try:
        for batch in range(50):
            wanted = [[(batch % 6, 1.0), ((batch + 1) % 6, 1.0)], [(batch % 4, 1.0)]]
            engine.plan(batch, wanted)
            for layer, experts in enumerate(wanted):
                engine.stage(batch, layer)
                for expert, _ in experts:
                    address, block = int(table.entries[layer, expert]), arena.block(layer, expert)
                    assert torch.equal(read_in_place(address, block.numel()), block)
                engine.passed(batch, layer)
            engine.finish(batch)
        assert engine.take().prefetch_bytes > 40 * 2**20
    finally:
        engine.close()


def test_many_threads_may_call_at_once(memory):
    """As the copy thread and the one that computes do. A new one has no context until it is given one."""
    broken: list[BaseException] = []
    context = cuda.context()
    assert context

    def work(stream: torch.cuda.Stream, target: torch.Tensor, seed: int) -> None:
        try:
            cuda.use(context)
            assert cuda.context() == context
            for turn in range(50):
                offset = (turn * 7 + seed) * 4096
                cuda.copy_to_device(target.data_ptr(), memory.data_ptr() + offset, target.numel(), stream.cuda_stream)
                cuda.Event(stream.cuda_stream).synchronize()
                assert torch.equal(target.cpu(), memory[offset:][: target.numel()])
        except BaseException as error:
            broken.append(error)

    streams = [torch.cuda.Stream(DEVICE) for _ in range(3)]
    targets = [torch.zeros(2**20, dtype=torch.uint8, device=DEVICE) for _ in streams]
    torch.cuda.synchronize()
    with registered(memory):
        threads = [threading.Thread(target=work, args=(s, t, i)) for i, (s, t) in enumerate(zip(streams, targets, strict=True))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not broken
