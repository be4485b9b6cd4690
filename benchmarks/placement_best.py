"""How near the placement is to the best one: `python benchmarks/placement_best.py ART [--scheme int8] [--worst 6] [--tokens 256]`.

ART is an artifact that `quantize ART --scheme … --max-perplexity-increase …` has scored. The dearest linears by byte are those that a limit is
about. Every set of them is measured, all others quantised: 2^worst models. Then, for every limit that lies between two of them, the set that adding
up single costs chooses is compared with the largest one that was measured to keep within. Printed: how far sums are from what was measured, and
how many of the bytes that the best set saves are saved.
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from pathlib import Path

from shapes import ROOT

sys.path.insert(0, str(ROOT))


def main() -> int:
    """Measure all sets, and print one line a limit."""
    from commands.graphs import SOURCES
    from commands.placement_model import Model
    from graphs.quantize.placement import choose
    from graphs.quantize.sensitivities import read_scores
    from validation.joint_cost import JointCost
    from validation.perplexity import make_windows
    from validation.text import load_tokens

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--worst", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    scores, _ = read_scores(options.artifact, options.scheme)
    model = Model.open(options.artifact, options.scheme, SOURCES["tensorrt"])
    tokens = load_tokens(options.artifact, model.reference.config, None, options.tokens + 1)
    joint = JointCost(model.reference, make_windows(tokens.ids, options.tokens, options.tokens, tokens.bos))
    dearest = sorted((score.candidate for score in scores), key=lambda one: -one.cost / one.bytes_saved)[: options.worst]
    others = [score.name for score in scores if score.name not in {one.name for one in dearest}]
    measured: dict[frozenset[str], float] = {}
    for count in range(len(dearest) + 1):
        for chosen in combinations([one.name for one in dearest], count):
            measured[frozenset(chosen)] = joint.measure(model.forms.of([*others, *chosen])).kl
            print(f"\r{len(measured)} of {2 ** len(dearest)} sets", end="", file=sys.stderr, flush=True)
    _compare(dearest, measured, choose)
    return 0


def _compare(dearest: list, measured: dict[frozenset[str], float], choose) -> None:  # type: ignore[no-untyped-def,type-arg]
    costs, sizes = {one.name: one.cost for one in dearest}, {one.name: one.bytes_saved for one in dearest}
    paid = measured[frozenset()]
    everything = measured[frozenset(costs)] - paid
    print(f"\n{len(dearest)} dearest: alone they cost {sum(costs.values()):.5f} nats, together {everything:.5f}; all others {paid:.5f}")
    errors = [sum(costs[name] for name in chosen) / (kl - paid) for chosen, kl in measured.items() if chosen]
    print(f"sum of single costs ÷ measured, over {len(errors)} sets: {min(errors):.2f} … {max(errors):.2f}")
    shares = []
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        limit = share * everything
        within = {chosen: sum(map(sizes.__getitem__, chosen)) for chosen, kl in measured.items() if kl - paid <= limit}
        best = max(within, key=lambda chosen: within[chosen])
        # The budget that the measured whole allows, as `place` finds it: the largest of those whose set keeps within.
        budgets = sorted({sum(costs[name] for name in chosen) for chosen in measured})
        ours = max((one for budget in budgets if (one := choose(dearest, budget)) in within), key=lambda chosen: within[chosen])
        shares.append(within[ours] / within[best] if within[best] else 1.0)
        print(f"limit {share:.0%} of it: best saves {within[best] / 1e6:6.2f} MB (KL {measured[best] - paid:.5f}), "
              f"placement {within[ours] / 1e6:6.2f} MB (KL {measured[ours] - paid:.5f}), ratio {shares[-1]:.3f}")  # fmt: skip
    print(f"mean ratio {sum(shares) / len(shares):.3f}, worst {min(shares):.3f}")


if __name__ == "__main__":
    sys.exit(main())
