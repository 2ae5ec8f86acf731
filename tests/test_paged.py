"""Keys in blocks and the ragged kernel: against twins in torch, and the bookkeeping against a plain dictionary."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from collm.models.attention import Row
from collm.models.paged import plan as planned
from collm.models.paged.blocks import Blocks
from collm.models.paged.ops import Ops, TorchOps
from collm.models.paged.plan import Plan, fill
from collm.models.paged.pool import WIDE_TILE

pytest.importorskip("triton", reason="Triton is for Linux")
from triton.runtime.errors import OutOfResources

from collm.models.paged import launching, triton_ops
from collm.models.paged.triton_ops import PROGRAMS, TritonOps

SIZE = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Shape:
    """`rows`: (start, width) of each text."""

    heads: int
    kv: int
    dim: int
    rows: tuple[tuple[int, int], ...]
    window: int = 0
    softcap: float | None = None
    padding: int = 0


def ragged(rng: random.Random, texts: int, longest: int, widest: int) -> tuple[tuple[int, int], ...]:
    return tuple((rng.randrange(longest), rng.randint(1, widest)) for _ in range(texts))


RNG = random.Random(0)
SHAPES = [
    Shape(4, 2, 16, ((0, 1),)),
    Shape(4, 2, 16, ((0, 5),), padding=3),
    Shape(4, 4, 16, ((17, 1), (3, 1), (31, 1)), padding=1),
    Shape(8, 2, 16, ((15, 2), (16, 1), (47, 17))),
    Shape(8, 1, 16, ((9, 3), (0, 20))),
    Shape(32, 1, 16, ((9, 1), (4, 3))),
    Shape(6, 2, 16, ((9, 7), (30, 6)), padding=3),
    Shape(4, 2, 24, ((5, 4), (33, 1))),
    Shape(4, 2, 32, ((5, 4), (33, 1)), softcap=5.0),
    Shape(4, 2, 16, ((40, 1), (3, 9)), window=8),
    Shape(4, 2, 16, ((40, 20), (60, 2)), window=17),
    Shape(4, 2, 16, ((40, 20), (60, 2)), window=5, softcap=2.0),
    # Several chunks.
    Shape(4, 2, 16, ((300, 1),)),
    Shape(4, 2, 16, ((600, 5), (3, 1), (255, 1), (256, 1))),
    Shape(4, 2, 16, ((600, 3), (10, 2)), window=40, padding=3),
    Shape(4, 1, 16, ((520, 2), (511, 1)), softcap=3.0),
    Shape(2, 1, 64, ((280, 1), (2, 2))),
    *(Shape(4, 2, 16, ragged(RNG, 5, 90, 9), padding=RNG.randrange(4)) for _ in range(3)),
]


OPS: list[Ops] = [
    TorchOps(),
    TritonOps(programs=2, reads=[(16, 1)], wide=0),
    TritonOps(programs=2, reads=[(16, 1)], wide=32),
]


def made(shape: Shape, seed: int = 0) -> tuple[Plan, Tensor, Tensor, Tensor, list[Tensor]]:
    """The plan of a pass, empty storage and its table, and keys and values of every text's past, by slot."""
    torch.manual_seed(seed)
    rows = [Row(slot, start, width) for slot, (start, width) in enumerate(shape.rows)]
    order = random.Random(seed)
    blocks = Blocks(1 + sum(row.end // SIZE + 1 for row in rows), len(rows) + 1, 64, SIZE)
    order.shuffle(blocks._free)
    for row in rows:
        blocks.write(row.slot, 0, row.end)
    tokens = sum(row.width for row in rows)
    tile = max(16, 1 << (shape.heads // shape.kv - 1).bit_length())
    numbers = np.zeros(planned.size(tokens + shape.padding), dtype=np.int32)
    items = fill(numbers, rows, list(range(tokens)), blocks, tile // (shape.heads // shape.kv))
    plan = Plan(torch.from_numpy(numbers).to(DEVICE), tokens + shape.padding, tile, items)
    # What others left there must not be read.
    storage = torch.full((blocks.num_blocks + 1, shape.kv, SIZE, shape.dim), torch.nan, device=DEVICE)
    table = torch.zeros((blocks.num_slots + 1, 64), dtype=torch.int32)
    table[:-1] = torch.from_numpy(blocks.table)
    past = [torch.randn(2, row.end, shape.kv, shape.dim) for row in rows]
    for row, both in zip(rows, past, strict=True):
        for position in range(row.start):
            block = blocks.table[row.slot, position // SIZE]
            storage[block, :, position % SIZE] = both[0, position].to(DEVICE)
    values = storage.clone()
    for row, both in zip(rows, past, strict=True):
        for position in range(row.start):
            values[blocks.table[row.slot, position // SIZE], :, position % SIZE] = both[1, position].to(DEVICE)
    return plan, storage, values, table.to(DEVICE), past


def run(ops: Ops, shape: Shape) -> tuple[Tensor, Tensor]:
    """What a pass reads with `ops`, and what it should: each query by itself, by the definition."""
    plan, keys, values, table, past = made(shape)
    new = [both[:, start:] for (start, _), both in zip(shape.rows, past, strict=True)]
    key, value = (torch.cat([each[i] for each in new]) for i in (0, 1))
    query = torch.randn(plan.num_tokens, shape.heads, shape.dim)
    filler = torch.full((shape.padding, shape.kv, shape.dim), torch.nan)
    ops.store(*(torch.cat([each, filler]).to(DEVICE) for each in (key, value)), keys, values, plan)
    found = ops.attend(query.to(DEVICE), keys, values, plan, table, 0.3, shape.window, shape.softcap)
    expected, token = [], 0
    for (start, width), both in zip(shape.rows, past, strict=True):
        for position in range(start, start + width):
            low = max(0, position + 1 - shape.window) if shape.window else 0
            k, v = both[:, low : position + 1].double().repeat_interleave(shape.heads // shape.kv, 2)
            scores = torch.einsum("hd,phd->hp", query[token].double(), k) * 0.3
            if shape.softcap:
                scores = torch.tanh(scores / shape.softcap) * shape.softcap
            expected.append(torch.einsum("hp,phd->hd", scores.softmax(-1), v))
            token += 1
    return found[:token].cpu(), torch.stack(expected).float()


@pytest.mark.parametrize("ops", OPS, ids=["torch", "triton", "at once"])
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_a_ragged_pass(shape: Shape, ops: Ops) -> None:
    found, expected = run(ops, shape)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("ops", OPS[:2], ids=["torch", "triton"])
def test_the_table_is_told_by_the_tokens(ops: Ops) -> None:
    blocks = Blocks(8, 2, 4, SIZE)
    rows = [Row(1, 0, 40), Row(0, 0, 3)]
    for row in rows:
        blocks.write(row.slot, row.start, row.end)
    numbers = np.zeros(planned.size(45), dtype=np.int32)
    fill(numbers, rows, [7] * 43, blocks, 4)
    table = torch.full((3, 4), -1, dtype=torch.int32, device=DEVICE)
    ops.enter(Plan(torch.from_numpy(numbers).to(DEVICE), 45, 16, 301), table, SIZE)
    expected = torch.full((3, 4), -1, dtype=torch.int32)
    expected[0, 0], expected[1, :2], expected[2, 0] = blocks.table[0, 0], torch.tensor(blocks.table[1, :2]), 8
    assert table.tolist() == expected.tolist()


def test_no_item_is_long_and_none_too_many() -> None:
    blocks = Blocks(4000, 16, 600, SIZE)
    for starts in ([8000] + [100] * 15, [8000] * 4, [100] * 16):
        for slot, start in enumerate(starts):
            blocks.write(slot, 0, start + 1)
        numbers = np.zeros(planned.size(16), dtype=np.int32)
        fill(numbers, [Row(n, start, 1) for n, start in enumerate(starts)], [0] * len(starts), blocks, 4)
        items, chunk = numbers[:2].tolist()
        assert items == sum(-(-(start + 1) // chunk) for start in starts) <= planned.num_items(16)
        assert chunk == planned.CHUNK


def test_a_long_prompt_is_read_with_few_partial_results() -> None:
    """Those of CodeLlama-7B (32 key heads of 128 numbers, 16,384 positions), the last of whose prompt is read, were 1.1
    GB: more than all else of the pass together, and than a card of 24 GB has left beside the keys."""
    blocks, kv, dim = Blocks(64, 1, 64, 256), 32, 128
    blocks.write(0, 0, 16384)
    numbers = np.zeros(planned.size(1024), dtype=np.int32)
    items = fill(numbers, [Row(0, 15360, 1024)], [0] * 1024, blocks, WIDE_TILE)
    assert items * kv * WIDE_TILE * (dim + 2) * 4 < 300e6
    assert items * kv > 2 * PROGRAMS, "and still there is work for each multiprocessor"


def test_what_a_plan_says_by_its_definition() -> None:
    """Of random rows, token by token and piece by piece; some have too many items for the shortest chunk."""
    chunks = set()
    for seed in range(40):
        rng, blocks = random.Random(seed), Blocks(4000, 16, 600, SIZE)
        rows, size = [], rng.choice([32, 96, 300])
        while (left := size - rng.choice([0, 9]) - sum(row.width for row in rows)) > 0 and len(rows) < 12:
            start, width = rng.choice([0, 3, SIZE - 1, 700, 9000]), min(left, rng.choice([1, 1, 2, 7, 30, 90]))
            rows.append(Row(rng.choice([n for n in range(16) if n not in [row.slot for row in rows]]), start, width))
            blocks.write(rows[-1].slot, 0, rows[-1].end)
        ids = [rng.randrange(1000) for row in rows for _ in range(row.width)]
        numbers = np.full(planned.size(size), 7, dtype=np.int32)
        items = fill(numbers, rows, ids, blocks, 4)
        lines, chunk = numbers[planned.HEAD :].reshape(planned.LINES, -1).tolist(), int(numbers[1])
        chunks.add(chunk)
        places = [(row.slot, position) for row in rows for position in range(row.start, row.end)]
        padding = size - len(places)
        assert lines[planned.IDS] == ids + [0] * padding
        assert lines[planned.POSITIONS] == [position for _, position in places] + [0] * padding
        assert lines[planned.SLOTS] == [slot for slot, _ in places] + [16] * padding
        stored = [int(blocks.table[slot, position // SIZE]) * SIZE + position % SIZE for slot, position in places]
        assert lines[planned.WHERE] == stored + [4000 * SIZE] * padding
        pieces = list(zip(*lines[planned.TOKEN : planned.ITEM + 1], strict=True))
        item = token = 0
        for first, width, slot, start, first_item in [piece for piece in pieces if piece[1]]:
            assert (first, first_item) == (token, item) and width <= 4
            assert [(slot, start + n) for n in range(width)] == places[token : token + width]
            token += width
            item += -(-(start + width) // chunk)
        assert token == len(places) and item == items == numbers[0] <= planned.num_items(size)
        assert set(pieces[sum(piece[1] > 0 for piece in pieces) :]) <= {(0, 0, 0, 0, planned.NO_ITEM)}
    assert len(chunks) > 1


def test_blocks_are_shared_until_they_are_written() -> None:
    """Random traffic against a dictionary of what each slot holds; `content` stands for the storage."""
    for seed in range(30):
        rng = random.Random(seed)
        blocks, held = Blocks(40, 4, 16, 4), {slot: list[int]() for slot in range(4)}
        content: dict[tuple[int, int], int] = {}
        for step in range(60):
            slot = rng.randrange(4)
            what = rng.random()
            if what < 0.15:
                blocks.clear(slot)
                held[slot] = []
            elif what < 0.3:
                source = rng.choice([n for n in range(4) if n != slot])
                length = rng.randint(0, len(held[source]))
                blocks.share(source, slot, length)
                held[slot] = held[source][:length]
            else:
                start = rng.randint(0, len(held[slot]))
                new = [1000 * step + n for n in range(rng.randint(1, 9))]
                again = held[slot][start : start + len(new)]
                if again and rng.random() < 0.5:
                    new = again  # what is read once more, and what stands behind it, stays
                own = sum(blocks.needed(len(each)) for each in held.values())
                if own + blocks.needed(start + len(new)) > 38 or start + len(new) > 64:
                    continue
                free, taken = blocks.num_free, blocks.takes(slot, start, start + len(new))
                copies = blocks.write(slot, start, start + len(new))
                assert free - blocks.num_free == taken
                for source, target in copies:
                    for offset in range(4):
                        content[target, offset] = content.get((source, offset), -1)
                held[slot] = held[slot] if new == again else held[slot][:start] + new
                for position in range(start, start + len(new)):
                    content[int(blocks.table[slot, position // 4]), position % 4] = new[position - start]
            for n, tokens in held.items():
                assert tokens == [content[int(blocks.table[n, p // 4]), p % 4] for p in range(len(tokens))]
            for n, own in enumerate(blocks.of_slot):
                assert blocks.table[n, : len(own)].tolist() == own
            used = {block for own in blocks.of_slot for block in own}
            assert blocks.num_free == 40 - len(used)


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """And the keys of the attention kernel are fetched ahead, which takes room for three times 64 of them. A GPU with
    less shared memory can do with it."""
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py")],
        env={**without, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    shared = [line.split() for line in done.stdout.splitlines()]
    hopper, ada = ([int(size) for name, arch, size in shared if (name, arch) == ("attend", of)] for of in ("90", "89"))
    assert min(hopper) > 3 * 64 * 128 * 2
    # What an L4, an RTX 4090 or an RTX 5090 has, for heads of 256 numbers in float32 and the tiles of passes that read.
    assert max(ada) <= 99 * 1024


def test_where_shared_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are read fewer at a time, and what did not fit is not tried again; who has too little even so is told."""
    tried: list[tuple[int, int]] = []
    most = 32

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **how: Any) -> None:
        if "N" in how:
            tried.append((how["N"], how["num_stages"]))
            if how["N"] > most or how["num_stages"] > 2:
                raise OutOfResources(141312, 101376, "shared memory")
        launching.launch(kernel, grid, *arguments, **how)

    monkeypatch.setattr(triton_ops, "launch", launch)
    ops = TritonOps(programs=2, reads=((32, 3), (32, 2), (16, 1)))
    for _ in range(2):
        torch.testing.assert_close(*run(ops, SHAPES[0]), atol=2e-5, rtol=1e-4)
    assert tried == [(32, 3), (32, 2), (32, 2)]
    run(ops, Shape(4, 2, 32, ((0, 1),)))
    assert tried[3:] == [(32, 3), (32, 2)], "heads of another size may fit"
    most = 8
    with pytest.raises(OutOfResources):
        run(ops, SHAPES[0])
