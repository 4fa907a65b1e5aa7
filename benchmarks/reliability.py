"""What is lost or torn when ranks are killed, what damage goes unnoticed.

And how soon a rank learns of another's end.

    .venv/bin/python benchmarks/reliability.py [--kills 300] [--mutations 1000] [--faults 3]

The jobs are those of tests/crash_loop.py, tests/corruption.py and tests/comm/test_watchdog.py.
Writes ``benchmarks/results/reliability_<cores>_<date>.json``; the exit code is 1 if anything was
lost, torn or silent.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from report import write

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "comm")]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["pytest", "shardemb.kge.trainer", "fbgemm_gpu", "torch._dynamo", "crash_loop", "test_watchdog"]
)


def crashes(kills: int) -> dict:
    """Kill ranks of our jobs so often.

    And of jobs whose saver overwrites in place until that is caught.
    """
    from crash_loop import OURS, PLANTED, Loop

    start, ours = time.monotonic(), Loop(OURS, seed=0)
    ours.run(kills, seconds=3600)
    seconds = time.monotonic() - start
    planted = Loop(PLANTED, seed=0)
    planted.run(kills, seconds=600, stop_at_fault=True)
    return {
        "kills": ours.kills,
        "kills_within_a_save": ours.in_save,
        "attempts_by_ranks": dict(sorted(ours.world_sizes.items())),
        "runs_that_came_to_their_end": ours.runs,
        "lost_or_torn": len(ours.faults),
        "faults": ours.faults[:10],
        "seconds": round(seconds),
        "planted_overwriting_saver_caught_after_kills": planted.kills if planted.faults else None,
        "planted_fault": planted.faults[:1],
    }


def _save(rank: int, world_size: int, store: str, folder: Path) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from corruption import save_two

    torch.set_num_threads(1)
    if world_size > 1:
        where = {"init_method": f"file://{store}", "rank": rank, "world_size": world_size}
        dist.init_process_group("gloo", timeout=timedelta(seconds=60), **where)
    save_two(rank, world_size, folder)


def mutations(count: int) -> dict:
    """Damage checkpoints of 1, 2 and 3 ranks, so often in all."""
    from corruption import damage

    done, faults = Counter(), []
    for world_size in (1, 2, 3):
        with tempfile.TemporaryDirectory() as base:
            folder = Path(base) / "run"
            processes = [
                _context.Process(target=_save, args=(rank, world_size, f"{base}/store", folder))
                for rank in range(world_size)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join(60)
            more, bad = damage(folder, -(-count // 3), seed=world_size)
            done += more
            faults += bad
    return {
        "mutations": sum(done.values()),
        "by_kind": dict(sorted(done.items())),
        "silent_or_unclear": len(faults),
        "faults": faults[:10],
    }


def ends(rounds: int) -> dict:
    """Return the seconds after which the others raised PeerFailureError, the slowest of all ranks.

    Cases and rounds.
    """
    from test_watchdog import CASES, TIMEOUT, run

    slowest: dict[str, float] = {}
    for _ in range(rounds):
        for scenario, how, world_size, *_ in CASES:
            with tempfile.TemporaryDirectory() as folder:
                failed, errors = run(scenario, how, world_size, Path(folder))
            assert len(errors) == world_size - 1, (scenario, how, errors)
            after = max(error[5] for error in errors.values()) - failed
            slowest[how] = max(slowest.get(how, 0.0), after)
    return {
        "cases": len(CASES) * rounds,
        "timeout_s": TIMEOUT,
        "slowest_s": {how: round(seconds, 2) for how, seconds in slowest.items()},
        "bars_s": {"die": 2.0, "raise": 2.0, "stop": TIMEOUT + 2.0},
    }


def main() -> int:
    """Run all and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--faults", type=int, default=3, help="rounds")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    body = {}
    for name, measured in (
        ("corruption", lambda: mutations(arguments.mutations)),
        ("ends", lambda: ends(arguments.faults)),
        ("crashes", lambda: crashes(arguments.kills)),
    ):
        body[name] = measured()
        print(name, body[name], flush=True)
    write("reliability", body, arguments.output)
    return int(bool(body["crashes"]["lost_or_torn"] or body["corruption"]["silent_or_unclear"]))


if __name__ == "__main__":
    sys.exit(main())
