from dataclasses import replace

from reproduce.jobs import jobs_of
from reproduce.scales import SCALES


def test_what_an_arm_is_compared_with_is_run_before_it_once_for_every_seed():
    scale = replace(SCALES["cpu"], study_seeds=2)
    jobs = jobs_of(scale, ["threshold", "authors"], ["apex_threshold_0.25", "apex_authors"])
    assert [(job.arm.name, job.arm.study, job.seed) for job in jobs] == [
        (arm, study, seed)
        for own, study, names in (
            ("main", "threshold", ("vanilla_stagewise", "apex_threshold_0.25")),
            ("authors", "authors", ("vanilla_fresh_moments", "apex_authors")),
        )
        for seed in (1, 2)
        for arm, study in zip(names, (own, study), strict=True)
    ]
    jobs = jobs_of(scale, ["threshold", "sites"], seeds=1)
    assert [job.arm.name for job in jobs].count("vanilla_stagewise") == 1
    assert [job.arm.name for job in jobs_of(scale, ["main"], ["vanilla_wsd"])] == (
        ["vanilla_wsd"] * scale.other_seeds
    )
