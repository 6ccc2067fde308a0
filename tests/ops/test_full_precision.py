"""Our products are in full float32, whatever the process allows for the model's."""

import importlib.util
import threading

import pytest
import torch
from helpers import linear_site, selection, tiny_qwen, tokens
from simulated_ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from apex_composer import Expander, find_sites
from apex_composer.operators.operator import ExpansionOperator
from apex_composer.ops import full_precision
from apex_composer.ops.full_precision import bmm, full_float32
from apex_composer.sharding.sharded_executor import ShardedExecutor
from apex_composer.sharding.shards import Shard

HAS_BACKENDS = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.9 and newer


def precision():
    """What products of float32 are computed in now."""
    if HAS_BACKENDS:
        return (
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision,
        )
    return torch.get_float32_matmul_precision()


FULL = ("ieee", "ieee") if HAS_BACKENDS else "highest"


class Products(TorchDispatchMode):
    """Notes of every product of matrices its dtype, and the precision that is set meanwhile."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ in ("bmm", "mm", "addmm", "baddbmm"):
            self.found.append((precision(), arguments[-1].dtype))
        return function(*arguments, **(options or {}))


@pytest.fixture(params=["tf32 as Composer sets it", "high", "medium"])
def lowered(request):
    """Lower precision for the whole process; what is set then. The test must leave it so."""
    before = torch.get_float32_matmul_precision()
    if request.param.startswith("tf32"):
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.set_float32_matmul_precision(request.param)
    outside = precision()
    assert outside != FULL
    yield
    assert precision() == outside
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_of_whole_weights_computes_in_full_float32(lowered, autocast):
    model, ids = tiny_qwen(), tokens(3, 12)
    expander = Expander(find_sites(model), threshold=0.25, kv_heads="expand")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with expander.assessing():
        model(ids)
    expander.begin_stage()
    expander.attach(optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for _ in range(2):  # the first unfold computes D, later ones keep it
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            with Products() as products:
                optimizer.step()
                norms = expander.relative_norms()
            # Per weight and bias five to map the gradient, two to fold, two for the norm.
            assert len(products.found) >= 9 * len(expander.operators)
            assert set(products.found) == {(FULL, torch.float32)}
    assert all(norm > 0 for norm in norms.values())
    expander.remove()


def test_a_step_of_sharded_weights_computes_in_full_float32(lowered):
    site = linear_site(9, 6, dtype=torch.float32)
    operator = ExpansionOperator(site, selection([0, 2, 4, 6], [1, 3, 5, 7]))

    def one_rank(group):
        weight = torch.nn.Parameter(site.weight.detach().flatten())
        weight.grad = torch.randn(54)
        executor = ShardedExecutor([operator], [[Shard("w", weight, (9, 6), 0, 54, group)]], group)
        with Products() as products:
            executor.map_gradient()
            executor.unfold()
            executor.fold()
            executor.relative_norms()
        return products.found

    (found,) = run_ranks(1, one_rank)
    assert len(found) == 9 and set(found) == {(FULL, torch.float32)}


def test_an_error_restores_what_was_set(lowered):
    before = precision()
    with pytest.raises(RuntimeError, match="size"):
        bmm(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    assert precision() == before
    with pytest.raises(KeyError), full_float32():
        assert precision() == FULL
        raise KeyError
    assert precision() == before


def test_float64_and_tensors_without_memory_are_multiplied_as_they_are():
    left, right = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 4, 5).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bmm(left, right), torch.bmm(left, right))
    assert bmm(left.to("meta"), right.to("meta")).shape == (2, 3, 5)


class Backend:
    """A backend's setting as torch 2.9 has it: `none` follows the one for all backends."""

    common = "none"

    def __init__(self, own: str):
        self.own = own

    @property
    def fp32_precision(self):
        return self.common if self.own == "none" else self.own

    @fp32_precision.setter
    def fp32_precision(self, precision):
        self.own = precision


@pytest.mark.parametrize(
    ("common", "cuda", "cpu"),
    [("none", "none", "none"), ("none", "tf32", "bf16"), ("tf32", "none", "ieee")],
)
def test_settings_of_backends_are_lowered_and_restored(common, cuda, cpu, monkeypatch):
    """With torch 2.9 and newer, where reading the older setting may raise."""
    backends = Backend(cuda), Backend(cpu)
    monkeypatch.setattr(Backend, "common", common)
    monkeypatch.setattr(torch.backends.cuda, "matmul", backends[0])
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", backends[1], raising=False)
    monkeypatch.delattr(torch, "get_float32_matmul_precision")
    found = importlib.util.find_spec(full_precision.__name__)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    with pytest.raises(KeyError), module.full_float32():
        assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        raise KeyError
    assert [backend.own for backend in backends] == [cuda, cpu]


@pytest.mark.gpu
def test_on_a_gpu_tf32_changes_the_models_products_and_not_ours(lowered):
    left, right = torch.randn(32, 64, 64, device="cuda"), torch.randn(32, 64, 2048, device="cuda")
    exact = left.double() @ right.double()
    own, plain = (
        float((found.double() - exact).norm() / exact.norm())
        for found in (bmm(left, right), torch.bmm(left, right))
    )
    assert own < 1e-6  # 24 bits, sums of 64
    if torch.cuda.get_device_capability() >= (8, 0):  # older ones have no TF32, of 11 bits
        assert plain > 1e-4


def test_two_threads_leave_what_was_set(lowered):
    """One that came in between would read the other's setting, and set it again at its end."""
    inside, outside = threading.Event(), threading.Event()

    def hold():
        with full_float32():
            inside.set()
            outside.wait(0.2)

    first = threading.Thread(target=hold)
    first.start()
    inside.wait()

    def overlap():
        with full_float32():
            outside.set()
            first.join(0.2)

    second = threading.Thread(target=overlap)
    second.start()
    for thread in (first, second):
        thread.join()  # and the fixture looks at what is set
