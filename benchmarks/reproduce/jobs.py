"""Which runs a campaign is of, in the order in which they are begun."""

from collections.abc import Iterator, Sequence

from reproduce.arms import is_conventional
from reproduce.runs import Job
from reproduce.scales import Scale
from reproduce.studies import arms_of, baseline_of


def jobs_of(
    scale: Scale,
    chosen: Sequence[str],
    names: Sequence[str] | None = None,
    seeds: int | None = None,
) -> list[Job]:
    """All runs of some studies: every arm's first seed, then every arm's second, and so on.

    What an arm is compared with is run before it, also where another study has it.

    Args:
        scale: its numbers of seeds.
        chosen: names of studies.
        names: of arms; default all.
        seeds: of an arm at most; default the scale's numbers.

    Raises:
        SystemExit: where a study has no such arm.
    """
    known = [arm.name for study in chosen for arm in arms_of(study)]
    if unknown := sorted(set(names or ()) - set(known)):
        raise SystemExit(f"--arms: {', '.join(unknown)} is none of {', '.join(known)}")
    jobs = [
        Job(arm, seed)
        for study in chosen
        for arm in arms_of(study)
        for seed in arm.seeds(scale)[:seeds]
        if names is None or arm.name in names
    ]
    jobs.sort(key=lambda job: (chosen.index(job.arm.study), job.seed - job.arm.first_seed))
    return list(_with_baselines(jobs))


def _with_baselines(jobs: Sequence[Job]) -> Iterator[Job]:
    known = {(job.arm.name, job.seed) for job in jobs}
    for job in jobs:
        if not is_conventional(job.arm):
            baseline = baseline_of(job.arm)
            if (baseline.name, job.seed) not in known:
                known.add((baseline.name, job.seed))
                yield Job(baseline, job.seed)
        yield job
