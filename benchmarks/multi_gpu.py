"""Tokens per second and memory of DDP and FSDP2 on several GPUs, beside hand-written loops.

A GPT of 0.84 billion parameters in bfloat16 (``bf16-true``: weights, gradients and AdamW's state), sequences of 1024 tokens,
8 of them per GPU and step, fused AdamW, clipping by norm, no activation checkpointing. The loops by hand are plain PyTorch:
``DistributedDataParallel(gradient_as_bucket_view=True)``, or ``fully_shard`` on each block and on the whole. All variants
start from the same weights and see the same samples, so their losses must agree, which is checked.

    python benchmarks/multi_gpu.py                                2 GPUs, about 4 minutes
    python benchmarks/multi_gpu.py --reference PYTHON             an interpreter that has lightning 2.x, to be measured too
    python benchmarks/multi_gpu.py --interleaved                  times alone: blocks by hand and of the trainer in turns, in one process
    python benchmarks/multi_gpu.py --tiny --device cpu            a matter of seconds: does it work?

Each variant runs in new processes, several times, in turns with the others: ratios are those of runs that followed each other.
Where the speed of the machine changes from run to run, as that of FSDP2 did, ``--interleaved`` tells more: its ratios are those of a
block of the trainer's steps and the two blocks by hand around it, of another model in the same processes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import describe_machine

HERE = Path(__file__).resolve().parent
ENGINES, WRITERS = ("ddp", "fsdp"), ("hand", "trainer", "reference")
UPSTREAM = re.compile(r"(lightning|pytorch_lightning)(-.*)?$", re.IGNORECASE)
FROM_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


# ---- one run of a variant -------------------------------------------------------------------------------------------


def commands(variant: str, args: argparse.Namespace, folder: Path, site: str | None) -> list[tuple[list[str], dict[str, str]]]:
    """The commands of the processes to start, each with its environment; the trainers start their other processes themselves."""
    engine, writer = variant.split("-")
    options = ["--engine", engine, "--writer", writer, "--out", str(folder), *passed_on(args)]
    environment = {name: value for name, value in os.environ.items() if name not in FROM_LAUNCHERS}
    environment["OMP_NUM_THREADS"] = "1"
    program = str(HERE / "multi_gpu_run.py")
    if writer == "reference":
        environment = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return [([args.reference, program, *options], environment)]
    command = [sys.executable, program, *options]
    environment["PYTHONPATH"] = str(HERE.parent / "src")
    if site is not None:
        command.insert(1, "-S")
        environment["PYTHONPATH"] += os.pathsep + site
    if writer in ("trainer", "both"):
        return [(command, environment)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(args.devices)}
    return [(command, {**environment, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(args.devices)]


def passed_on(args: argparse.Namespace) -> list[str]:
    """The options that every run has to know."""
    names = ("device", "devices", "precision", "batch", "warm_up", "blocks", "steps")
    options = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return [*options, "--tiny"] if args.tiny else options


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(variant: str, args: argparse.Namespace, site: str | None) -> dict[str, Any]:
    """Run a variant in new processes; what its ranks have measured, or the error."""
    with tempfile.TemporaryDirectory(prefix="multi_gpu_") as name:
        folder = Path(name)
        started, processes = time.monotonic(), []
        with open(folder / "log", "w") as log:
            for command, environment in commands(variant, args, folder, site):
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder)
                )
            failed = wait(processes, args.limit)
        ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
        if failed or len(ranks) != args.devices:
            last = (folder / "log").read_text().strip().splitlines()[-25:]
            return {"error": failed or f"{len(ranks)} of {args.devices} ranks reported", "log": last}
        tokens = args.devices * args.batch * ranks[0]["context"] * args.steps
        return {
            "tokens_per_second": tokens / statistics.median(ranks[0]["seconds"]),
            "seconds": ranks[0]["seconds"],
            **{key: max(rank[key] for rank in ranks) for key in ("peak_memory", "peak_memory_with_setup")},
            **{key: ranks[0][key] for key in ("others", "loss", "torch", "version", "gpu", "parameters")},
            "took": round(time.monotonic() - started, 1),
        }


def wait(processes: list[subprocess.Popen[bytes]], limit: float) -> str | None:
    """Wait for the end of all; why they failed. One that fails, or takes too long, ends the others."""
    deadline = time.monotonic() + limit
    failed = None
    try:
        while failed is None and any(process.poll() is None for process in processes):
            codes = [process.poll() for process in processes]
            if any(codes):
                failed = f"ended with the codes {codes}"
            elif time.monotonic() > deadline:
                failed = f"took longer than {limit:.0f} s"
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the session that was made for it
            process.wait()
    codes = [process.returncode for process in processes]
    return failed or (f"ended with the codes {codes}" if any(codes) else None)


def without_upstream(folder: str) -> str | None:
    """Where upstream's lightning is installed beside PyTorch, a folder with links to everything but it, for ``python -S``."""
    sites = [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and os.path.isdir(path)]
    names = [(site, name) for site in sites for name in os.listdir(site)]
    if not any(UPSTREAM.match(name) and "keraunos" not in name.lower() for _, name in names):
        return None
    for site, name in names:
        link = os.path.join(folder, name)
        if not UPSTREAM.match(name) and not os.path.lexists(link):
            os.symlink(os.path.join(site, name), link)
    return folder


# ---- all of them ----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, site: str | None) -> dict[str, list[dict[str, Any]]]:
    """All runs of all variants, in turns: forwards, backwards, forwards, ..."""
    writers = WRITERS if args.reference else WRITERS[:2]
    runs: dict[str, list[dict[str, Any]]] = {f"{engine}-{writer}": [] for engine in args.only for writer in writers}
    started = time.monotonic()
    for turn in range(args.rounds):
        if turn and (time.monotonic() - started) * (turn + 1) / turn > args.budget:
            print(f"stopped after {turn} rounds: another one would exceed the budget of {args.budget:.0f} s", flush=True)
            break
        for engine in args.only:
            for writer in writers if turn % 2 == 0 else reversed(writers):
                variant = f"{engine}-{writer}"
                result = run(variant, args, site)
                runs[variant].append(result)
                print(f"{variant:15}  {described(result)}", flush=True)
    return runs


def interleaved(args: argparse.Namespace, site: str | None) -> int:
    """Print the ratios of each engine's blocks to those by hand around them; how many runs failed."""
    failed = 0
    for engine in args.only:
        for _ in range(args.rounds):
            result = run(f"{engine}-both", args, site)
            failed += "error" in result
            if "error" in result:
                print(f"{engine}: {described(result)}", flush=True)
                continue
            others = [(before + after) / 2 for before, after in zip(result["others"], result["others"][1:])]
            ratios = sorted(ours / by_hand for ours, by_hand in zip(result["seconds"], others))
            print(
                f"{engine}: tokens/s of by hand, over {len(ratios)} blocks: median {1 / statistics.median(ratios):.4f}, "
                f"from {1 / ratios[-1]:.4f} to {1 / ratios[0]:.4f}; {result['tokens_per_second']:,.0f} tokens/s; "
                f"milliseconds a step by hand: {[round(1000 * each / args.steps, 1) for each in result['others']]}; "
                f"{args.devices} x {result['gpu']}, torch {result['torch']}, took {result['took']} s",
                flush=True,
            )
    return failed


def described(result: dict[str, Any]) -> str:
    if "error" in result:
        return "\n    ".join([f"failed: {result['error']}", *result["log"]])
    rate, memory = result["tokens_per_second"], result["peak_memory"]
    return f"{rate:11,.0f} tokens/s  {memory:7.2f} GiB  loss {result['loss']:.5f}  in {result['took']} s"


def compare(runs: dict[str, list[dict[str, Any]]], engines: list[str]) -> dict[str, dict[str, Any]]:
    """For each engine and writer the medians, and, beside the hand-written loop of the same round, their ratios."""
    table: dict[str, dict[str, Any]] = {}
    for variant, results in runs.items():
        engine = variant.split("-")[0]
        pairs = [(ours, hand) for ours, hand in zip(results, runs[f"{engine}-hand"]) if "error" not in ours and "error" not in hand]
        if not pairs:
            continue
        row: dict[str, Any] = {"rounds": len(pairs), "loss": pairs[0][0]["loss"], "version": pairs[0][0]["version"]}
        for key in ("tokens_per_second", "peak_memory", "peak_memory_with_setup"):
            row[key] = statistics.median(ours[key] for ours, _ in pairs)
            ratios = [ours[key] / hand[key] for ours, hand in pairs]
            row[f"{key}_ratio"] = statistics.median(ratios)
            row[f"{key}_ratios"] = [round(ratio, 4) for ratio in ratios]
        row["loss_difference"] = max(abs(ours["loss"] - hand["loss"]) for ours, hand in pairs)
        table[variant] = row
    return table


def shown(table: dict[str, dict[str, Any]]) -> str:
    head = ["", "tokens/s", "of by hand", "peak GiB", "of by hand", "with set-up", "of by hand", "loss"]
    rows = [
        [
            variant.replace("-", ", ").replace("hand", "by hand") + (f" {row['version']}" if row["version"] else ""),
            f"{row['tokens_per_second']:,.0f}", f"{row['tokens_per_second_ratio']:.3f}",
            f"{row['peak_memory']:.2f}", f"{row['peak_memory_ratio']:.3f}",
            f"{row['peak_memory_with_setup']:.2f}", f"{row['peak_memory_with_setup_ratio']:.3f}",
            f"{row['loss']:.5f}",
        ]
        for variant, row in table.items()
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in [head, *rows])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--devices", type=int, default=2, help="GPUs, or processes on the CPU")
    parser.add_argument("--precision", choices=("bf16-true", "bf16-mixed", "32-true"), default="bf16-true")
    parser.add_argument("--batch", type=int, help="sequences per device and step; 8, or 2 with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a very small model, and few steps")
    parser.add_argument("--warm-up", type=int, help="steps before the measured ones; 8, or 2 with --tiny")
    parser.add_argument("--blocks", type=int, help="measured blocks of steps in a run; 4, or 2 with --tiny")
    parser.add_argument("--steps", type=int, help="steps in a block; 10, or 3 with --tiny")
    return parser


def fill_in(args: argparse.Namespace) -> argparse.Namespace:
    """Defaults that depend on the size."""
    for name, large, tiny in (("batch", 8, 2), ("warm_up", 8, 2), ("blocks", 4, 2), ("steps", 10, 3)):
        if getattr(args, name) is None:
            setattr(args, name, tiny if args.tiny else large)
    return args


def main() -> None:
    """Measure, print, write; exit code 1 if a run failed or losses disagree."""
    arguments = parser()
    arguments.add_argument("--reference", metavar="PYTHON", help="an interpreter that has lightning 2.x, to be measured too")
    arguments.add_argument("--rounds", type=int, default=3, help="runs of each variant")
    arguments.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES))
    arguments.add_argument("--limit", type=float, default=90.0, help="seconds that a run may take")
    arguments.add_argument("--budget", type=float, default=540.0, help="seconds that all may take; no round begins that would exceed it")
    arguments.add_argument("--json", type=Path, help="where the figures go; benchmarks/results/multi_gpu.json unless --tiny")
    arguments.add_argument("--interleaved", action="store_true", help="the times alone, in turns within one run")
    args = fill_in(arguments.parse_args())
    with tempfile.TemporaryDirectory(prefix="multi_gpu_site_") as folder:
        site = without_upstream(folder)
        if args.interleaved:
            sys.exit(bool(interleaved(args, site)))
        runs = measure(args, site)
    table = compare(runs, args.only)
    good = [result for results in runs.values() for result in results if "error" not in result]
    where = f"{args.devices} x {good[0]['gpu']}, torch {good[0]['torch']}" if good else "nowhere"
    print(f"\n{args.precision}, batches of {args.batch} per device, medians of {args.rounds} runs. {where}")
    print(shown(table))
    target = args.json or (None if args.tiny else HERE / "results" / "multi_gpu.json")
    if target is not None:
        settings = {name: getattr(args, name) for name in ("devices", "precision", "batch", "warm_up", "blocks", "steps", "rounds")}
        figures = {**describe_machine(), "torch": torch.__version__, **(good[0] if good else {}), "settings": settings}
        figures = {key: value for key, value in figures.items() if key in ("gpu", "torch", "parameters", "settings", *describe_machine())}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**figures, "table": table, "runs": runs}, indent=2) + "\n")
    apart = {name: row["loss_difference"] for name, row in table.items() if row["loss_difference"] > 0.02 * abs(row["loss"])}
    if apart:
        print(f"The losses disagree with those of the hand-written loops: {apart}")
    sys.exit(bool(apart) or len(good) < sum(map(len, runs.values())))


if __name__ == "__main__":
    main()
