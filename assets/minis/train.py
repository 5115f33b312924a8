"""Trains one mini on one GPU and judges it: `python -m assets.minis.train --experts 64 --data DIRECTORY --out DIRECTORY`.

First an encoder-decoder that fills gaps in text, then from it an encoder with a head for SST-2, MRPC and MultiRC, or for those that
--heads names. SST-2's are taught by a tutor (`taught.py`). Each is written as soon as it is there, rounded to bfloat16 and judged
as it is written; a file of metrics grows as it goes. The DIRECTORY of --data is what `prepare.py` wrote. The clock decides how
many steps there are, so two runs of one seed are not equal to the bit.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional

from assets.minis import export, steps, taught
from assets.minis.lessons import Labelled, Labels, Leanings, Pupil, language, language_loss
from assets.minis.network import PAD, Shape, Sparse, Spent, Switch
from assets.minis.steps import Loss, Phase, Steps, say

JUDGED = {"sst2": ("sst2.dev", "movie.dev"), "mrpc": ("mrpc.dev",), "multirc": ("multirc.dev",)}
ROWS_AT_ONCE = 64


def padded(ids: np.ndarray, lengths: np.ndarray, device: torch.device, at_once: int = ROWS_AT_ONCE) -> list[torch.Tensor]:
    """Rows in batches, in order, int64 (rows, longest)."""
    starts = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
    batches = []
    for first in range(0, len(lengths), at_once):
        part = range(first, min(first + at_once, len(lengths)))
        made = np.full((len(part), int(lengths[part].max())), PAD, dtype=np.int64)
        for row, i in zip(made, part, strict=True):
            row[: lengths[i]] = ids[starts[i] : starts[i + 1]]
        batches.append(torch.from_numpy(made).to(device))
    return batches


@torch.no_grad()
def perplexity(model: Switch, data: dict[str, np.ndarray], name: str, device: torch.device, limit: int | None = None) -> float:
    """Of the targets of held-out windows, end and sentinels included, as T5's is counted."""
    sources = padded(data[f"{name}.source.ids"], data[f"{name}.source.lengths"][:limit], device)
    targets = padded(data[f"{name}.target.ids"], data[f"{name}.target.lengths"][:limit], device)
    total = count = 0.0
    for source, target in zip(sources, targets, strict=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=limit is not None and device.type == "cuda"):
            logits = model.write(source, target, Spent()).float()
        total += functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, reduction="sum").item()
        count += int((target != PAD).sum())
    return math.exp(total / count)


@torch.no_grad()
def judge(model: Switch, data: dict[str, np.ndarray], name: str, device: torch.device) -> dict[str, float]:
    """Accuracy and F1 of label 1, in float32."""
    lengths, label = data[f"{name}.lengths"], data[f"{name}.label"].astype(bool)
    logits = torch.cat([model.classify(rows, Spent()) for rows in padded(data[f"{name}.ids"], lengths, device)])
    said = logits.argmax(1).cpu().numpy().astype(bool)
    right = int((said & label).sum())
    f1 = 2 * right / max(2 * right + int((said != label).sum()), 1)
    return {"accuracy": float((said == label).mean()), "f1": f1}


@torch.no_grad()
def routers(model: Switch, data: dict[str, np.ndarray], name: str, device: torch.device) -> list[dict[str, float]]:
    """How each encoder router spreads the tokens of a set.

    used: experts that any token goes to; busiest: the share of the most used; by_token: the share of tokens that go where most
    tokens of the same id go, in the same set: 1 would be a router that reads no context.
    """
    layers = [layer.feed for layer in model.encoder.layers if isinstance(layer.feed, Sparse)]
    ids: list[torch.Tensor] = []
    chosen: list[list[torch.Tensor]] = [[] for _ in layers]
    for rows in padded(data[f"{name}.ids"], data[f"{name}.lengths"], device):
        model.encode(rows, Spent())
        real = (rows != PAD).flatten()
        ids.append(rows.flatten()[real])
        for layer, found in zip(layers, chosen, strict=True):
            assert layer.chosen is not None
            found.append(layer.chosen[real])
    tokens = torch.cat(ids).cpu().numpy()
    spread = []
    for found in chosen:
        experts = torch.cat(found).cpu().numpy()
        counts = np.bincount(experts, minlength=model.shape.num_experts)
        pairs, many = np.unique(tokens * 4096 + experts, return_counts=True)
        most = np.zeros(int(tokens.max()) + 1, dtype=np.int64)
        np.maximum.at(most, pairs // 4096, many)
        spread.append(
            {
                "used": int((counts > 0).sum()),
                "busiest": float(counts.max() / len(tokens)),
                "by_token": float(most.sum() / len(tokens)),
            }
        )
    return spread


class Record:
    """metrics.json, as it grows."""

    def __init__(self, path: Path, first: dict[str, Any]):
        self.path, self.found = path, first

    def add(self, **more: Any) -> None:
        self.found |= more
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")


def train(
    settings: dict[str, Any],
    experts: int,
    data_dir: Path,
    out: Path,
    seconds: float,
    seed: int = 0,
    graphs: bool = True,
    text: Path | None = None,
) -> dict[str, Any]:
    """Everything; returns what the file of metrics holds.

    Args:
        text: an encoder-decoder that was trained before; heads alone are trained then.
    """
    begun = time.monotonic()
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("highest")
    with np.load(data_dir / "minis.npz") as file:
        data = {name: file[name] for name in file.files}
    tokenizer = data_dir / "tokenizer"
    shape = Shape(experts, vocab_size=len(data["goes_on"]), **settings["shapes"][experts])
    model = Switch(shape, capacity=settings["capacity"]).to(device).eval()
    out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    say(f"{experts} experts, {sum(p.numel() for p in model.parameters()):,} parameters, {name}, torch {torch.__version__}")
    own = settings["pretrain"]["share"] if text is None else 0.0
    seconds_a_share = seconds / (own + sum(_shares(settings, task) for task in settings["heads"]))
    record = Record(
        out / f"metrics-{experts}.json",
        {"experts": experts, "seconds": seconds, "seed": seed, "device": name, "torch": torch.__version__, "settings": settings},
    )
    if text is None:
        model.shared.data.copy_(taught.embeddings(data, model.shared.detach().cpu()))
        _pretrain(model, settings["pretrain"], data, device, seconds_a_share, graphs, record)
    else:
        export.read(model, text)
    kept = copy.deepcopy(model.state_dict())
    export.rounded(model)
    written = export.write(model, out / f"switch-mini-{experts}-text", False, tokenizer)
    record.add(
        text={
            "bytes": written,
            "wikitext2": perplexity(model, data, "wikitext2", device),
            "wikipedia": perplexity(model, data, "wikipedia", device),
        }
    )
    say(f"text: {record.found['text']}")
    for task, variants in settings["heads"].items():
        how = settings["tutor"] if task == "sst2" else None
        _heads(model, kept, task, variants, how, data, device, out, seconds_a_share, graphs, record, tokenizer)
    record.add(took=round(time.monotonic() - begun, 1))
    say(f"done in {record.found['took']} s")
    return record.found


def _shares(settings: dict[str, Any], task: str) -> float:
    tutor = settings["tutor"]["share"] + settings["tutor"]["asks"] if task == "sst2" else 0.0
    return tutor + sum(variant["share"] for variant in settings["heads"][task])


def _pretrain(
    model: Switch,
    own: dict[str, Any],
    data: dict[str, np.ndarray],
    device: torch.device,
    seconds: float,
    graphs: bool,
    record: Record,
) -> None:
    """Gaps in text."""
    model.dropout = own["dropout"]
    phase = Phase("pretrain", seconds * own["share"], own["lr"], own["weight_decay"], graphs=graphs)
    stream = torch.from_numpy(data["language"].astype(np.int64)).to(device)
    goes_on = torch.from_numpy(data["goes_on"]).to(device)
    record.add(
        pretrain=steps.run(
            Steps(model, lambda batch: language_loss(model, batch), phase, device),
            language(stream, goes_on, own["rows"]),
            watch=lambda: f"wikipedia {perplexity(model, data, 'wikipedia', device, limit=ROWS_AT_ONCE):.2f}",
        )
    )


def _heads(
    model: Switch,
    kept: dict[str, torch.Tensor],
    task: str,
    variants: list[dict[str, Any]],
    tutor: dict[str, Any] | None,
    data: dict[str, np.ndarray],
    device: torch.device,
    out: Path,
    seconds: float,
    graphs: bool,
    record: Record,
    tokenizer: Path,
) -> None:
    """Encoders with a head for one task, from what was learnt before; the one that is best on the task's own set is written.

    Args:
        tutor: how a tutor learns and is asked; None: there are labels alone.
        seconds: for a share of 1.
    """
    first, *others = JUDGED[task]
    widths = tuple(variants[0]["widths"])
    if tutor is None:
        ids, lengths, positive = (data[f"{task}.train.{part}"] for part in ("ids", "lengths", "positive"))
        labelled = Labelled.of(ids, lengths, widths, (torch.from_numpy(positive),), device)
    else:
        labelled, found = taught.lessons(data, tutor, widths, device, seconds, graphs, steps_seed=int(record.found["seed"]))
        record.add(tutor=found)
    tried: list[dict[str, Any]] = []
    for number, given in enumerate(variants):
        how = {
            key: value for key, value in given.items() if key not in ("share", "lr", "weight_decay", "dropout", "tokens", "widths")
        }
        model.load_state_dict(kept)
        model.dropout = given["dropout"]
        phase = Phase(f"{task} {number}", seconds * given["share"], given["lr"], given["weight_decay"], graphs=graphs)
        loss: Loss
        trained: nn.Module
        if tutor is None:
            trained, loss = model, partial(Labels(**how).loss, model)
        else:
            pupil = Pupil(model, labelled.groups[0][2].shape[1]).to(device)
            trained, loss = pupil, partial(Leanings(**how).loss, pupil)
        learnt: dict[str, Any] = steps.run(
            Steps(trained, loss, phase, device),
            labelled.batches(given["tokens"]),
            watch=lambda: f"{first} {judge(model, data, first, device)['accuracy']:.4f}",
        )
        export.rounded(model)
        learnt |= {name: judge(model, data, name, device) for name in (first, *others)}
        say(f"{task} {number}: { ({name: learnt[name] for name in (first, *others)}) }")
        if not tried or learnt[first]["accuracy"] > max(before[first]["accuracy"] for before in tried):
            written = export.write(model, out / f"switch-mini-{record.found['experts']}-{task}", True, tokenizer)
            best = {"variant": number, "bytes": written, "routers": routers(model, data, first, device)}
        tried.append(learnt)
        record.add(**{task: best | {"variants": tried}})
    say(f"{task}: variant {best['variant']} is kept; routers {best['routers']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True, help="what assets.minis.prepare wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0, help="of training; judging takes about 10 seconds more on a GPU")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("minis.yaml"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="the encoder-decoder of an earlier training: heads alone are trained")
    parser.add_argument("--heads", nargs="+", choices=sorted(JUDGED), help="for which tasks; default: all, and the time is shared")
    parser.add_argument("--no-graphs", action="store_true", help="run steps without CUDA graphs")
    given = parser.parse_args()
    settings = yaml.safe_load(given.config.read_text())
    if given.heads:
        settings["heads"] = {task: variants for task, variants in settings["heads"].items() if task in given.heads}
    train(settings, given.experts, given.data, given.out, given.minutes * 60, given.seed, not given.no_graphs, given.text)


if __name__ == "__main__":
    main()
