"""Invented runs, and the answer to them, for tests of what a report draws."""

import math
from pathlib import Path
from statistics import fmean

import numpy as np

from apex_composer.report.answers import Answer, Crossing, Estimate, Final, Group, Reach, Speed
from apex_composer.report.run import Curve, Run, Stage

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def example_stage(number: int, batch: int, *, layers: int, heads: int, channels: int) -> Stage:
    """A stage whose scores and selections are drawn from its number."""
    random = np.random.default_rng(number)
    units, scores, high, low, overlap, spread = {}, {}, {}, {}, {}, {}
    for layer in range(layers):
        for name, unit, count in (("attn", "head", heads), ("mlp", "channel", channels)):
            group = f"layers.{layer}.{name}"
            units[group], spread[group] = unit, 0.5 + 0.1 * number + 0.01 * layer
            scores[group] = random.normal(size=count).tolist()
            order, share = np.argsort(scores[group]), max(1, count // 8)
            high[group], low[group] = order[-share:].tolist(), order[:share].tolist()
            overlap[group] = (0.6, 0.4)
    return Stage(number, batch, True, units, high, low, overlap if number else {}, spread, scores)


def example_run(
    name: str,
    *,
    batches: int = 200,
    offset: float = 0.0,
    stages: int = 0,
    domains: tuple[str, ...] = ("arxiv", "github"),
    size: dict[str, int] | None = None,
    seed: int = 17,
) -> Run:
    """A run with everything that a report shows.

    Args:
        offset: added to its losses.
        stages: of APEX. Default: none.
        size: layers, heads and channels of the model.
    """
    number = np.arange(1, batches + 1)
    noise = np.random.default_rng(seed).normal(size=batches) / 20
    tokens, logged = number * 2048, slice(None, None, 10)
    falling = 3 + 3 / np.sqrt(number + 5) + offset * number / batches

    def curve(values: np.ndarray, kept: slice = slice(None)) -> Curve:
        return Curve(number[kept].tolist(), tokens[kept].tolist(), values[kept].tolist())

    every = slice(batches // 10 - 1, None, batches // 10)
    sizes = size or {"layers": 4, "heads": 8, "channels": 512}
    metrics = {"lr-DecoupledAdamW/group0": curve(1e-4 * (1 - 0.9 * number / batches), logged)}
    if stages:
        for place, projection in enumerate(PROJECTIONS):
            grown = curve(0.002 * (place + 1) * np.sqrt(number), logged)
            metrics[f"apex/operator_norm/{projection}"] = grown
    rank = {
        f"layers.{n}.{p}": {"layer": n, "projection": p, "entropy_rank": 100.0 + n + len(p)}
        for n in range(sizes["layers"])
        for p in PROJECTIONS
    }
    return Run(
        name=name,
        folder=Path("runs") / name / str(seed),
        settings={"seed": seed, "max_duration": f"{batches}ba"},
        versions={"python": "3.11.2", "torch": "2.7.0"},
        device="cpu, 2 threads",
        data={"tokens": 7_860_000_000, "sha256": "0" * 64},
        loss=curve(falling + noise),
        validation={d: curve(falling + n / 3, every) for n, d in enumerate(domains)},
        validation_tokens=dict.fromkeys(domains, 1000),
        step_seconds=(0.3 + noise**2).tolist(),
        metrics=metrics,
        stages=[example_stage(n, n * batches // stages, **sizes) for n in range(stages)],
        observations={"before.json": {"ranks": {"weights": rank}}} if stages else {},
        missing=["MFU: no speed_monitor in its YAML"],
    )


def estimate(*values: float) -> Estimate:
    """An estimate over seeds, with an invented interval."""
    mean = fmean(values)
    ends = (mean - 0.01, mean + 0.01) if len(values) > 1 else (None, None)
    return Estimate(mean, *ends, values)


def example_answer(groups: dict[str, list[Run]]) -> Answer:
    """The answer to runs by the name of their group, the first of which is the baseline."""
    first, *others = groups
    domains = list(groups[first][0].validation)

    def loss(name: str, domain: str) -> list[float]:
        chosen = domains if domain == "total" else [domain]
        return [fmean(run.validation[d].values[-1] for d in chosen) for run in groups[name]]

    def final(name: str, domain: str) -> Final:
        own, base = loss(name, domain), loss(first, domain)
        perplexity, before = [*map(math.exp, own)], [*map(math.exp, base)]
        nats = [one - other for one, other in zip(own, base, strict=True)]
        less = [one - other for one, other in zip(perplexity, before, strict=True)]
        differences = (None, None) if name == first else (estimate(*nats), estimate(*less))
        return Final(estimate(*own), estimate(*perplexity), *differences, paired=True)

    target = loss(first, "total")[0]
    crossing = Crossing(17, target, 280_000.0, 245_760, 286_720, 409_600)
    reached = estimate(280_000.0)
    told = "reaches it after 280 k tokens, 68.4 % of the baseline's."
    return Answer(
        sentence=f"{others[0] if others else first} ends 1.7 % lower in perplexity than {first}.",
        cautions=("One seed: the spread between seeds is unknown.",),
        groups=tuple(
            Group(name, tuple(runs), tuple(run.settings["seed"] for run in runs), name == first)
            for name, runs in groups.items()
        ),
        baselines=(first,),
        baseline_rule="the run without APEX",
        domains=(*domains, "total"),
        finals={name: {d: final(name, d) for d in (*domains, "total")} for name in groups},
        reaches=tuple(
            Reach(n, first, "total", (crossing,), reached, estimate(0.684), f"{n} {told}")
            for n in others
        ),
        settings={
            "algorithms.apex.threshold": tuple("none" if n == first else "0.125" for n in groups)
        },
        hidden=("run_name", "save_folder"),
        versions={},
        same_versions={"python": "3.11.2", "torch": "2.7.0"},
        speeds={
            n: Speed(0.302, 0.299, 0.31, 6781.4, None, 0.015 if n != first else None, "cpu")
            for n in groups
        },
        missing={n: tuple(run.missing) for n, (run, *_) in groups.items()},
    )


def two_runs() -> dict[str, list[Run]]:
    """A baseline and a run with APEX in three stages."""
    return {
        "vanilla": [example_run("vanilla")],
        "apex": [example_run("apex", offset=-0.1, stages=3)],
    }


def largest() -> dict[str, list[Run]]:
    """Ten runs of 30,000 batches, of TinyLLaMA's size, with five stages, on seven domains."""
    shape = {"layers": 22, "heads": 32, "channels": 5632}
    given = {"batches": 30_000, "size": shape, "domains": tuple(f"domain_{n}" for n in range(7))}
    return {
        f"tinyllama_apex_threshold_{n}": [
            example_run(f"tinyllama_{n}", offset=-0.01 * n, stages=5 if n else 0, **given)
        ]
        for n in range(10)
    }
