"""The whole protocol in small: arms that must be equal are, and a killed campaign goes on."""

import json
from dataclasses import replace

import machine
import pytest
import torch
from reproduce import alone, bases, campaign, continued, records, runs, texts
from reproduce.arms import Arm
from reproduce.scales import SCALES
from reproduce.texts import load, prepare_small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the smoke scale's text and base, after all runs of its main comparison."""
    folder = tmp_path_factory.mktemp("reproduce")
    assert run(folder) == 0
    return folder


def run(folder, *options: str, out="results.jsonl") -> int:
    where = ["--folder", str(folder), "--texts", str(folder / "texts"), "--out", str(folder / out)]
    return campaign.main(["smoke", *where, *options])


@pytest.fixture
def results(folder):
    return records.read(folder / "results.jsonl")


def losses(results, arm, seed=1):
    (found,) = (r["losses"] for r in results if (r["arm"], r["seed"]) == (arm, seed))
    return found


def test_selection_without_expansion_is_vanilla_bit_for_bit(results):
    assert losses(results, "selection_only") == losses(results, "vanilla_stagewise")


def test_arms_that_do_something_differ_from_vanilla(results):
    vanilla = losses(results, "vanilla_stagewise")
    others = {r["arm"] for r in results} - {"vanilla_stagewise", "selection_only"}
    assert {"apex_rank", "apex_random", "weak_units_only", "vanilla_constant_averaged"} <= others
    for arm in others:
        assert losses(results, arm)[0] == vanilla[0]  # all begin from the one base
        assert losses(results, arm)[-1] != vanilla[-1], arm


def test_every_result_says_what_it_depends_on(results):
    assert len({(r["base"], r["texts"]) for r in results}) == 1
    for result in results:
        assert {"commit", "device", "versions", "threads"} <= set(result["machine"])
        assert result["machine"]["device"] == machine.processor()
        assert result["command"].endswith("reproduce/campaign.py smoke --study main")
        assert result["settings"]["name"] == result["arm"].removesuffix("_averaged")
        assert result["scale"]["rate"] == SCALES["smoke"].rate


def test_what_is_done_is_not_done_again(folder, capsys):
    path = folder / "results.jsonl"
    before = path.read_text()
    run(folder)
    assert path.read_text() == before
    count = len(campaign.jobs_of(SCALES["smoke"], ["main"]))
    assert f"{count} of {count} runs" in capsys.readouterr().out


def test_a_campaign_goes_on_where_it_was_killed(folder, results, tmp_path):
    """The last line torn: its run alone is done again, to the same bits."""
    path = tmp_path / "results.jsonl"
    text = (folder / "results.jsonl").read_text()
    path.write_text(text[:-40])
    run(folder, out=path)
    again = records.read(path)
    assert len(again) == len(results)
    for old, new in zip(results, again, strict=True):
        assert (old["arm"], old["seed"], old["losses"]) == (new["arm"], new["seed"], new["losses"])


def test_an_average_without_its_run_is_no_result(folder, results, tmp_path):
    """Both are one write, of which a killed campaign may leave the first line."""
    path = tmp_path / "results.jsonl"
    pair = [record for record in results if record["arm"].startswith("vanilla_constant")][:2]
    records.append(path, pair)
    assert [record["arm"] for record in pair] == ["vanilla_constant_averaged", "vanilla_constant"]
    path.write_text(path.read_text()[:-40])
    found = records.done(records.read(path))
    scale, texts = SCALES["smoke"], load(folder / "texts")
    base = bases.get_base("mixture", scale, texts, folder, torch.device("cpu"))
    job = next(j for j in campaign.jobs_of(scale, ["main"]) if j.arm.name == "vanilla_constant")
    assert campaign.expected_key(job, scale, texts, base) not in found
    records.append(path, pair[1:])
    assert campaign.expected_key(job, scale, texts, base) in records.done(records.read(path))


def test_two_campaigns_in_one_folder_are_refused(folder):
    with alone.alone_in(folder), pytest.raises(SystemExit, match="another campaign works in"):
        run(folder)


def test_what_a_run_could_not_read_is_refused_before_a_base_is_trained(folder):
    scale, texts = SCALES["smoke"], load(folder / "texts")
    main = campaign.jobs_of(scale, ["main"])
    campaign.check_texts(main, scale, texts)
    with pytest.raises(ValueError, match="github missing"):
        campaign.check_texts(campaign.jobs_of(scale, ["shift"]), scale, texts)
    long = replace(scale, sizes=replace(scale.sizes, length=10_000))
    with pytest.raises(ValueError, match="held_out/.* a window of length=10000"):
        campaign.check_texts(main, long, texts)
    with pytest.raises(ValueError, match="do not fill a batch"):
        campaign.check_texts(main, replace(scale, batch=100_000), texts)
    with pytest.raises(ValueError, match="stages: long has 6, allowed: at most 5"):
        campaign.check_texts([campaign.Job(Arm("long", stages=6), 1)], scale, texts)


def test_data_that_would_not_be_read_is_refused(folder, tmp_path):
    with pytest.raises(SystemExit, match="--data: the scale smoke reads the pages of"):
        run(folder, "--data", str(tmp_path))
    with pytest.raises(SystemExit, match="--data: "):
        run(folder, "--data", str(tmp_path))


def test_how_long_it_will_take_is_said_beforehand(results):
    scale = replace(SCALES["cpu"], workers=2)
    jobs = campaign.jobs_of(scale, ["main"], ["vanilla_wsd"])
    text = "cpu: 2 runs of 6,000 batches are to be done"
    assert campaign.estimate(jobs, scale, "a", []) == (
        f"{text}; the main comparison took {scale.duration}"
    )
    shared = {"scale": {"name": "cpu"}, "stage_ends": [1000, 2000]}
    known = [
        {**shared, "seconds": seconds, "machine": {"device": device}}
        for seconds, device in ((200, "a"), (202, "a"), (20, "b"), (198, "a"))
    ]
    assert campaign.estimate(jobs, scale, "a", known) == f"{text}, about 5 minutes by earlier ones"


def test_a_run_that_no_time_is_left_for_is_not_begun(folder, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    assert run(folder, "--budget", "0", out=path)
    assert records.read(path) == []
    assert "0 of" in capsys.readouterr().out


def test_fewer_seeds_take_the_first_of_every_arm(folder):
    scale = SCALES["cpu"]
    whole = campaign.jobs_of(scale, ["threshold", "confirm", "main"])
    some = campaign.jobs_of(scale, ["threshold", "confirm", "main"], seeds=1)
    assert some == [job for job in whole if job.seed == job.arm.first_seed]
    assert 0 < len(some) < len(whole)
    options = campaign.parse(["cpu", "--seeds", "2"])
    assert campaign.command(options).endswith("campaign.py cpu --study main --seeds 2")
    with pytest.raises(SystemExit, match="--seeds: got 0, allowed: 1 or more"):
        run(folder, "--seeds", "0")


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"arm": 1}\n{"arm"\n{}\n')
    with pytest.raises(ValueError, match=r"results.jsonl:2: .*Remove this line"):
        records.read(path)


def test_appending_cuts_off_a_torn_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"arm": 1}\n{"ar')
    records.append(path, [{"arm": 2}])
    assert [json.loads(line)["arm"] for line in path.read_text().splitlines()] == [1, 2]


def test_results_of_other_settings_do_not_count_as_done(folder, results):
    scale, texts = SCALES["smoke"], load(folder / "texts")
    base = bases.get_base("mixture", scale, texts, folder, torch.device("cpu"))
    job = runs.Job(Arm("apex_rank", apex={}, share="seeds"), 1)
    known = records.done(results)
    assert campaign.expected_key(job, scale, texts, base) in known
    for other in (
        campaign.expected_key(job, replace(scale, rate=1e-3), texts, base),
        campaign.expected_key(job, scale, replace(texts, hash="another"), base),
        campaign.expected_key(job, scale, texts, base._replace(hash="another")),
        campaign.expected_key(job._replace(seed=9), scale, texts, base),
        campaign.expected_key(
            job._replace(arm=Arm("apex_rank", apex={"threshold": 0.25})), scale, texts, base
        ),
    ):
        assert other not in known
    # More seeds or workers change no result.
    more = replace(scale, seeds=9, workers=2)
    assert campaign.expected_key(job, more, texts, base) in known


@pytest.mark.parametrize("keep", [True, False])
def test_operators_that_hardly_learn_leave_vanilla_bit_for_bit(folder, keep):
    """Batches, clipping, decay, rates, optimizer state and evaluations are the same."""
    scale, texts, device = SCALES["smoke"], load(folder / "texts"), torch.device("cpu")
    base = bases.get_base("mixture", scale, texts, folder, device)
    vanilla, apex = (
        continued.run_arm(Arm("a", apex=own, keep_optimizer=keep), 1, scale, base, texts, device)
        for own in (None, {"operator_lr_scale": 1e-30})
    )
    assert vanilla[0]["losses"] == apex[0]["losses"]
    assert vanilla[0]["training_losses"] == apex[0]["training_losses"]


def test_the_bases_optimizer_does_not_reach_weak_units(folder):
    scale, texts, device = SCALES["smoke"], load(folder / "texts"), torch.device("cpu")
    base = bases.get_base("mixture", scale, texts, folder, device)
    kept, fresh = (
        continued.run_arm(
            Arm("weak", apex={"trainable": "disadvantageous"}, keep_optimizer=keep),
            1, scale, base, texts, device,
        )
        for keep in (True, False)
    )  # fmt: skip
    assert kept[0]["losses"] == fresh[0]["losses"]


def test_a_base_goes_on_where_it_was_killed(folder, tmp_path, monkeypatch):
    """Its hash is that of one trained in one go."""
    scale, texts, device = SCALES["smoke"], load(folder / "texts"), torch.device("cpu")
    monkeypatch.setattr(bases, "_STRETCH", 7)
    monkeypatch.setattr(bases, "_SECONDS", 0.0)
    train, calls = bases.train, []

    def killed(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **settings)

    monkeypatch.setattr(bases, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        bases.get_base("mixture", scale, texts, tmp_path, device)
    again = bases.get_base("mixture", scale, texts, tmp_path, device)
    whole = bases.get_base("mixture", scale, texts, folder, device)
    assert again.hash == whole.hash
    assert again.batches == scale.base_batches


def test_a_base_of_a_missing_domain_is_refused(folder):
    with pytest.raises(ValueError, match="github missing"):
        bases.chosen(load(folder / "texts"), ("github",))


def test_the_averaged_model_is_the_mean_of_its_checkpoints(folder):
    model = torch.nn.Linear(2, 1, bias=False)
    average = continued.Average(model, {2, 4})
    for place, value in ((1, 5.0), (2, 1.0), (3, 7.0), (4, 4.0)):
        torch.nn.init.constant_(model.weight, value)
        average.add(place)
    average.load()
    assert model.weight.tolist() == [[2.5, 2.5]]


def test_averaged_checkpoints_are_of_the_second_half():
    places = continued.averaged_places(Arm("constant", "constant"), SCALES["cpu"])
    assert sorted(places) == [1800, 2100, 2400, 2700, 3000]


def test_fresh_optimizers_have_no_state(folder, tmp_path):
    prepare_small(tmp_path / "texts")
    scale, texts, device = SCALES["smoke"], load(tmp_path / "texts"), torch.device("cpu")
    base = bases.get_base("mixture", scale, texts, folder, device)
    kept, fresh = (
        continued.load_base(base, Arm("one", keep_optimizer=keep), scale, texts, device)[1]
        for keep in (True, False)
    )
    assert kept.state_dict()["state"] and not fresh.state_dict()["state"]


def test_pages_that_have_changed_are_another_text(tmp_path, monkeypatch):
    """An edited page of docs/ must neither stop the smallest scale nor pass for the old text."""
    monkeypatch.setattr(campaign, "run_jobs", lambda *arguments: 0)
    found = texts.own_pages()
    for pages in (found, [*found[:-1], found[-1] + "\n## One more\n\nIt has been added since."]):
        monkeypatch.setattr(texts, "own_pages", lambda pages=pages: pages)
        monkeypatch.setattr(campaign, "own_pages", lambda pages=pages: pages)
        command = ["smoke", "--folder", str(tmp_path), "--out", str(tmp_path / "out.jsonl")]
        campaign.main([*command, "--arms", "vanilla_wsd"])
    assert len(list(tmp_path.glob("texts-*"))) == len(list(tmp_path.glob("mixture-*.pt"))) == 2


def test_results_of_the_smallest_scale_are_not_put_beside_the_evidence(tmp_path):
    assert campaign.results_file(SCALES["smoke"], tmp_path) == tmp_path / "results.jsonl"
    found = campaign.results_file(SCALES["cpu"], tmp_path)
    assert found == campaign.ROOT / "benchmarks" / "results" / "reproduce-cpu.jsonl"
