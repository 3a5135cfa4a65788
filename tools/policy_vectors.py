"""States of a queue and what Python's policies decide in each: what other implementations are compared with.

`python -m tools.policy_vectors FILE [COUNT]`. Tables, queues and settings are random, with a seed, and everything that
a decision turns on lies in the file: the C++ policies have to agree on every state (`tests/cpp`).
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from variator.engines.latency import LatencyTable, Point
from variator.engines.policies import Costs, Drain, Fixed, Policy, SlackFit, Thresholds
from variator.engines.scheduler import buckets_up_to

TABLES = 25
NAMES = ("long", "s50")


@dataclass(frozen=True)
class Head:
    """The request that is served next."""

    arrival: float
    deadline: float
    bucket: int
    rows: int


@dataclass(frozen=True)
class State:
    """What a policy sees of a queue."""

    head: Head
    waiting: int
    drain_ms: list[float]
    pace: float


def vectors(count: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """`costs`: tables with what they are asked for; `states`: queue, policy, time and the decision of each."""
    rng = random.Random(seed)
    costs = [_costs(rng) for _ in range(TABLES)]
    states = [_state(rng, costs) for _ in range(count)]
    return {"costs": [described for described, _ in costs], "states": states}


def _costs(rng: random.Random) -> tuple[dict[str, Any], Costs]:
    """A table with noise, holes and any shapes, and what is asked of it."""
    ratios = [1, *rng.sample([2, 4, 8, 16, *NAMES], rng.randint(0, 4))]
    batches, lengths = (sorted(rng.sample(among, rng.randint(1, 5))) for among in (range(1, 80), range(1, 600)))
    noise = rng.choice((0.0, 0.02, 0.5))
    points = []
    for level, ratio in enumerate(ratios):
        for length in lengths:
            measured = rng.randint(1, len(batches)) if rng.random() < 0.3 else len(batches)
            for batch in batches[:measured]:
                time = (0.3 + 0.01 * batch * length) / (1 + 0.4 * level) * (1 + noise * rng.random())
                points.append(Point(ratio, batch, length, round(time, 4), time * 1.2, 9))
    rng.shuffle(points)
    table = LatencyTable("made-up", "fp32", "key", {"cpu": "none"}, tuple(points))
    buckets, rows = buckets_up_to(rng.choice((64, 150, 512, 2048))), rng.choice((1, 7, 32, 64))
    chosen = [ratio for ratio in ratios if ratio == 1 or rng.random() < 0.8]
    described = {"table": json.loads(table.to_json()), "ratios": chosen, "buckets": list(buckets), "max_rows": rows}
    return described, Costs(table, chosen, buckets, rows)


def _state(rng: random.Random, known: list[tuple[dict[str, Any], Costs]]) -> dict[str, Any]:
    index = rng.randrange(len(known))
    costs = known[index][1]
    slo, arrival = 10 ** rng.uniform(-1, 4), rng.uniform(-1e6, 1e6)
    if rng.random() < 0.3:
        slo = round(slo) + 0.05  # where rounding to a tenth turns on the last digit
    head = Head(arrival, arrival + slo, rng.randrange(len(costs.buckets)), rng.choice((1, 1, 1, 3, 40, 70, 200)))
    waiting = head.rows + rng.choice((0, 1, 5, 30, 500))
    shares = costs.shares(slo)
    drain = [waiting * level[head.bucket] * rng.choice((1.0, 1.0, rng.uniform(1, 20))) for level in shares]
    state = State(head, waiting, drain, rng.choice((1.0, rng.uniform(0.5, 4.0))))
    now = rng.choice((arrival, arrival + slo * rng.random(), arrival + slo * rng.random(), head.deadline + 1.0))
    policy = _policy(rng, costs)
    level, rows = policy.choose(state, costs, now)
    named = {"name": policy.name, **{name: value for name, value in asdict(policy).items() if name != "name"}}  # type: ignore[call-overload]
    return {"costs": index, **asdict(state), "policy": named, "now": now, "decision": [int(level), int(rows)]}


def _policy(rng: random.Random, costs: Costs) -> Policy:
    makers = (
        lambda: Fixed(rng.randrange(len(costs.ratios))),
        lambda: Thresholds(*rng.choice(((), ((0.1,),), (tuple(sorted(rng.uniform(0, 2) for _ in range(4))),)))),
        lambda: SlackFit(rng.choice((1, 5, 12, 100))),
        lambda: Drain(rng.uniform(0.05, 1.0), rng.uniform(0.8, 1.5)),
        Drain,
    )
    return rng.choice(makers)()


def main() -> None:
    """Write them."""
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    Path(sys.argv[1]).write_text(json.dumps(vectors(count)) + "\n")


if __name__ == "__main__":
    main()
