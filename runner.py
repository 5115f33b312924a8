"""The launcher: python runner.py COMMAND CONFIG.yaml [key.path=value ...]"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Config

EPILOG = """\
examples:
  python runner.py run configs/quickstart.yaml
  python runner.py run configs/quickstart.yaml store.budget=50% output_dir=runs/half
  python runner.py train configs/train-quickstart.yaml
  python runner.py bench configs/bench-movie.yaml
  python runner.py plan configs/quickstart.yaml
  python runner.py clean

Every key of a config is explained in docs/config.md. A value after a key is YAML, as in the file.
Exit codes: 0 done; 1 something broke; 2 what was given cannot work, with one line that says why; 130 interrupted;
143 stopped by SIGTERM.
"""
RESUMED, ANEW = "the same command does what is left", "the same command begins anew"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's threads and Ray's forks do not mix
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "killed by `ray.kill`")  # whom we end at the end is no news
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from pipeline.errors import USER_ERRORS  # here, so that --help answers at once
    from pipeline.stopping import stoppable

    def command() -> int:
        try:
            options.command(options)
        except USER_ERRORS as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0

    return stoppable(command, options.again)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="runner.py",
        description="Serves Mixture-of-Experts models that are larger than the device: predicts which experts the next "
        "batches need and holds only those, under a budget in bytes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, function, short: str, long: str, again: str = ANEW) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=short, description=long, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(command=function, again=again)
        return command

    def add_with_config(name: str, function, short: str, long: str, again: str = ANEW) -> None:
        command = add(name, function, short, long, again)
        command.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what to run; see configs/")
        command.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="key.path=value",
            help="replaces a value of the config, e.g. store.budget=10%%",
        )

    add_with_config("run", _run, "classify, score or generate over a data set", RUN, RESUMED)
    add_with_config("train", _train, "trace a model and train its predictor", TRAIN, RESUMED)
    add_with_config("bench", _bench, "compare systems on one workload", BENCH)
    add_with_config("plan", _plan, "what would fit, and how fast, before loading", PLAN)
    clean = add("clean", _clean, "remove arenas that nobody uses", CLEAN)
    clean.add_argument(
        "directory", nargs="?", type=Path, help="the store.directory to clean (default: /dev/shm and the user's cache)"
    )
    return parser


RUN = """\
Answers every row of a data set with the model, its experts held under store.budget.

Writes into output_dir: predictions.jsonl, metrics.json, timeline.json, report.html.
A run that was killed is resumed by the same command; a finished one is run again."""

TRAIN = """\
Runs the model over the config's data, records what its routers decide (or reads trace.load), trains the predictor that
predictor.kind names (lstm, token_table, rehearsal) on it, and writes predictor.path; beside it a picture of the
training, *.curve.svg.

Shows top-1 and top-3 per MoE layer on rows that had no part in it (train.holdout).
A training that was killed goes on after its last epoch."""

BENCH = """\
Runs the config's data through every system of bench.systems, in turn, several rounds, for every one of bench.batch_sizes and
bench.budgets: this project's Executor with every expert on the device and under a budget, transformers on the whole model,
accelerate's offload, and others that docs/benchmarks.md describes. Every time stands beside the error of the same answers.

Writes into output_dir: bench.json, bench.md, timeline-*.json and, with matplotlib, throughput.png and memory.png."""

PLAN = """\
Reads only the model's config and its weights' headers (of a hub model too) and says what the model takes, what is free, what fits,
and how fast the link is. With plan.trace, a routing recorded by `train` with predictor.kind=oracle, it also simulates every budget
of plan.budgets under every policy: moves, hits, samples per second, the knee, and what store.budget=auto would take.

Writes into output_dir: plan.json and, with a trace and matplotlib, plan.png."""

CLEAN = """\
Removes the arenas of this user that no process holds, in shared memory and on disk: what store.keep left for a
warm start, and what a killed run left behind. Says what it freed."""


def _config(options: argparse.Namespace) -> Config:
    """Before the command itself is imported: a key that is not known needs no torch, and is told at once."""
    from pipeline.config import load_config

    return load_config(options.config, options.overrides)


def _run(options: argparse.Namespace) -> None:
    config = _config(options)
    from pipeline.run import run

    run(config)


def _train(options: argparse.Namespace) -> None:
    config = _config(options)
    from pipeline.predicting.train import train

    train(config)


def _bench(options: argparse.Namespace) -> None:
    config = _config(options)
    from pipeline.bench.command import bench

    bench(config)


def _plan(options: argparse.Namespace) -> None:
    config = _config(options)
    from pipeline.plan.command import plan

    plan(config)


def _clean(options: argparse.Namespace) -> None:
    from pipeline.config import cache_directory
    from pipeline.errors import ConfigError
    from store.arena import clean

    defaults = [directory for directory in (Path("/dev/shm"), cache_directory()) if directory.is_dir()]
    for directory in defaults if options.directory is None else [options.directory]:
        if not directory.is_dir():
            raise ConfigError(f"{directory}: no such directory")
        removed, in_use = clean(directory)
        for item in removed:
            print(f"removed {item.path} ({item.nbytes / 1e6:.1f} MB)")
        for path in in_use:
            print(f"in use  {path}")
        print(f"freed {sum(item.nbytes for item in removed) / 1e6:.1f} MB in {directory}")


if __name__ == "__main__":
    from pipeline.unheard import unheard

    if sys.stdout is not None:  # closed by `>&-`
        sys.stdout = unheard(sys.stdout)
    sys.exit(main())
