"""Under torch.compile APEX trains as without it, and breaks graphs where its hooks are only."""

import logging

import pytest
import torch
from composer_run import run
from helpers import CHANGE_BOUND, SMOOTH_EPS, change_error, tiny_llama, tokens
from torch._dynamo.utils import counters

from apex_composer import APEX, Expander, FusedSwiGLU, find_sites

# A second layer shows what is compiled anew for every layer.
LAYERS = 2


@pytest.fixture(autouse=True)
def nothing_compiled():
    """What other tests have compiled is neither used nor counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs_and_breaks() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def hook_nothing(model) -> None:
    """The least that a hook which torch cannot trace does, where the hooks of APEX are."""

    @torch.compiler.disable
    def nothing(module, inputs):
        pass

    for probe in {site.group.probe for site in find_sites(model) if site.axis == 1}:
        probe.register_forward_pre_hook(nothing)


def train(model, forward, expander=None, steps: int = 3):
    """Steps of a stage, every forward pass assessed, and the scores after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if expander is not None:
        expander.begin_stage()
        expander.attach(optimizer)
    for seed in range(steps):
        ids = tokens(samples=3, length=12, seed=seed)
        optimizer.zero_grad()
        if expander is not None:
            expander.assessment.open()
        loss = forward(ids, labels=ids).loss
        if expander is not None:
            expander.assessment.close()
            expander.assessment.commit()
        loss.backward()
        optimizer.step()
        if seed == 0:
            first = graphs_and_breaks()
    assert graphs_and_breaks() == first  # nothing is compiled again in later batches
    return None if expander is None else expander.assessment.totals()


def apex(model) -> Expander:
    return Expander(find_sites(model), threshold=0.25, method="random", implementation="torch")


@pytest.mark.parametrize("fused", [False, True])
def test_steps_have_the_same_bits_and_no_more_breaks_than_hooks_need(fused):
    """The backend `eager` runs the kernels that run without torch.compile, in their order."""
    plain, model, hooked = (tiny_llama(layers=LAYERS) for _ in range(3))
    expected = train(plain, plain, apex(plain))
    expander = apex(model)
    if fused:  # compiled models keep their own SwiGLU
        FusedSwiGLU(model, True, collector=expander.assessment.reserve_norms)
    with torch._dynamo.config.patch(error_on_recompile=True):
        totals = train(model, torch.compile(model, backend="eager"), expander)
    found = graphs_and_breaks()
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    for name, total in expected.items():
        assert torch.equal(totals[name].scores, total.scores)
        assert torch.equal(totals[name].norm_sums, total.norm_sums)
        assert totals[name].samples == 9
    counters.clear()
    torch._dynamo.reset()
    hook_nothing(hooked)
    train(hooked, torch.compile(hooked, backend="eager"))
    # A replaced forward is one more function that a break goes through.
    graphs, breaks = graphs_and_breaks()
    assert found == (graphs, breaks + fused) and breaks > 0


def test_swiglu_that_stays_the_models_own_is_said(caplog):
    with caplog.at_level(logging.INFO, "apex_composer.model.fused_swiglu"):
        for config in (None, {"backend": "eager"}):
            settings = {"assessment": {"method": "random"}, "fused_swiglu": True}
            model = tiny_llama(layers=1)
            run(
                APEX(stages=1, **settings),
                model=model,
                max_duration="1ba",
                compile_config=config,
            )
    told = [r.message for r in caplog.records if r.name == "apex_composer.model.fused_swiglu"]
    assert told == ["apex: SwiGLU is the model's own, which torch.compile compiles"]


def trained_by_composer(compile_config: dict | None):
    """What training in two stages changed, flat, and the scores of the last stage."""
    model = tiny_llama(layers=1)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    # Without a first assessment, whose forward passes in evaluation mode are compiled separately.
    settings = {"stages": 2, "assessment": {"method": "random"}, "implementation": "torch"}
    options = {"eps": SMOOTH_EPS, "compile_config": compile_config}
    algorithm, _, _ = run(APEX(**settings), model=model, **options)
    changed = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    return changed, algorithm._expander.state_dict()["scores"]


def check_composer(compile_config: dict) -> None:
    expected, plain_scores = trained_by_composer(None)
    changed, scores = trained_by_composer(compile_config)
    found = graphs_and_breaks()
    assert (changed - expected).norm() < CHANGE_BOUND * expected.norm()
    for name, (_, norm_sums, samples) in plain_scores.items():
        assert scores[name][2] == samples == 12
        # Of weights that differ by a thousandth of what training changed, a tenth of them.
        torch.testing.assert_close(scores[name][1], norm_sums, rtol=1e-4, atol=0)
    counters.clear()
    torch._dynamo.reset()
    hooked = tiny_llama(layers=1)
    hook_nothing(hooked)
    run(model=hooked, compile_config=compile_config)
    assert found == graphs_and_breaks() and found[1] > 0


def test_composer_trains_compiled_models_with_the_breaks_that_hooks_need():
    check_composer({"backend": "eager"})


@pytest.mark.long
def test_composer_trains_models_that_inductor_compiles():
    """Takes a C++ compiler, and a minute of it."""
    check_composer({})


def test_a_compiled_optimizer_step_leaves_ours_out():
    """Traced, it would be compiled anew for every site, up to torch's limit."""
    runs, graphs = [], []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    for compiled in (False, True):
        model = tiny_llama(layers=LAYERS)
        expander = Expander(find_sites(model), threshold=0.25, method="random")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=SMOOTH_EPS)
        expander.begin_stage()
        expander.attach(optimizer)
        start = {name: weight.clone() for name, weight in model.state_dict().items()}
        step = torch.compile(lambda o=optimizer: o.step(), backend=backend)
        for i in range(3):
            optimizer.zero_grad()
            model(input_ids=tokens(2, seed=i), labels=tokens(2, seed=i)).loss.backward()
            step() if compiled else optimizer.step()
        runs.append(model.state_dict())
    assert not any("bmm" in target or "index" in target for graph in graphs for target in graph)
    for name, weight in runs[0].items():
        assert change_error(runs[1][name], weight, start[name]) < CHANGE_BOUND
