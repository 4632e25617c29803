"""Deals scikit-learn's digits to a number of sites, as the NPZ files that `seqfed client` reads.

Each site gets OUT/site-NN/train.npz and OUT/site-NN/validation.npz with the arrays
x, float32 (examples, 8 steps, 8 features) in 0..1, and y, int64 (examples,), the digit.

The same arguments give the same files. A second run over the same OUT changes nothing if its
arguments are the same and is an error if they are not, because the clients' state belongs to the
data they were dealt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

BRIGHTEST = 16  # the digits' pixels are counts from 0 to 16
FEWEST = 20  # examples at a site: fewer leave the validation part without a meaning


def deal(
    labels: NDArray[np.int64], sites: int, alpha: float | None, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """The indices of `labels` split among the sites, each index exactly once, in random order.

    Without alpha every site gets an even share. With it each digit is split by proportions drawn
    from a symmetric Dirichlet distribution: the smaller alpha, the more the sites differ (Hsu, Qi
    and Brown 2019, "Measuring the Effects of Non-Identical Data Distribution").
    """
    if alpha is None:
        return np.array_split(rng.permutation(len(labels)), sites)
    hands: list[list[NDArray[np.int64]]] = [[] for _ in range(sites)]
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(sites, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
        for hand, part in zip(hands, np.split(indices, cuts), strict=True):
            hand.append(part)
    return [rng.permutation(np.concatenate(hand)) for hand in hands]


def write(folder: Path, x: NDArray[np.float32], y: NDArray[np.int64], validation: float) -> None:
    """Write one site's examples, the first `validation` part of them to the validation file."""
    folder.mkdir(parents=True)
    held_out = round(len(y) * validation)
    np.savez(folder / "validation.npz", x=x[:held_out], y=y[:held_out])
    np.savez(folder / "train.npz", x=x[held_out:], y=y[held_out:])
    print(f"{folder.name}: {len(y) - held_out} examples to train on, {held_out} to validate with")


def main() -> int:
    """Deal the digits as the command line asks; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to deal into")
    parser.add_argument("--shards", type=int, default=3, help="number of sites")
    parser.add_argument("--alpha", type=float, help="Dirichlet concentration; even shares without")
    parser.add_argument("--validation", type=float, default=0.2, help="held-out part, 0 to 1")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.shards < 1:
        parser.error(f"--shards is {args.shards}; it must be 1 or more")
    if args.alpha is not None and args.alpha <= 0:
        parser.error(f"--alpha is {args.alpha}; it must be above 0")
    if not 0 < args.validation < 1:
        parser.error(f"--validation is {args.validation}; it must lie between 0 and 1")

    wanted = {name: getattr(args, name) for name in ("shards", "alpha", "validation", "seed")}
    dealt = args.out / "dealt.json"  # written last: without it an earlier run was cut off
    if dealt.exists():
        before = json.loads(dealt.read_text())
        if before == wanted:
            print(f"{args.out}: already dealt")
            return 0
        print(
            f"{args.out} was dealt with {before}, and now {wanted} is asked; "
            "remove it (docker-compose down --volumes) to deal anew",
            file=sys.stderr,
        )
        return 1

    pixels, labels = load_digits(return_X_y=True)
    x = (np.asarray(pixels) / BRIGHTEST).astype(np.float32).reshape(-1, 8, 8)
    y = np.asarray(labels).astype(np.int64)
    hands = deal(y, args.shards, args.alpha, np.random.default_rng(args.seed))
    smallest = min(len(hand) for hand in hands)
    if smallest < FEWEST:
        print(
            f"a site would get {smallest} examples, and {FEWEST} is the fewest; "
            "ask for fewer --shards, a larger --alpha or another --seed",
            file=sys.stderr,
        )
        return 1
    for number, hand in enumerate(hands):
        folder = args.out / f"site-{number:02d}"
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, x[hand], y[hand], args.validation)
    dealt.write_text(json.dumps(wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
