"""`python -m tests.simulation SEED [--trace]`: one world again, or `--seeds A-B`: many."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from tests.simulation.world import World


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("--seeds", help="A-B: all of them, B too")
    parser.add_argument("--trace", action="store_true", help="tell everything that happens, log lines too")
    parser.add_argument("--keep-going", action="store_true", help="after a failing seed")
    given = parser.parse_args()
    if given.seeds:
        first, _, last = given.seeds.partition("-")
        seeds = range(int(first), int(last or first) + 1)
    elif given.seed is not None:
        seeds = range(given.seed, given.seed + 1)
    else:
        parser.error("which seed?")
    failed = 0
    began = time.perf_counter()
    for seed in seeds:
        world = World(seed, tell if given.trace else None)
        try:
            digest = world.run()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed += 1
            if len(seeds) == 1 and not given.trace:
                tell("\n".join(world.trace[-60:]))
            if len(seeds) == 1:
                traceback.print_exception(error)
            tell(f"seed {seed}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}")
            if not given.keep_going:
                return 1
        else:
            if len(seeds) == 1:
                tell(f"seed {seed}: {len(world.trace)} events, {world.loop.time():.0f} s, {digest[:16]}")
    if len(seeds) > 1:
        took = time.perf_counter() - began
        tell(f"{len(seeds)} seeds, {failed} failed, {took:.1f} s, {1000 * took / len(seeds):.0f} ms a seed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
