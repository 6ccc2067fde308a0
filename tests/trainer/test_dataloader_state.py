"""A pass over the training data beforehand leaves the order of training as it would have been."""

import itertools
import random
import shutil

import numpy
import pytest
import torch
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from apex_composer.trainer.dataloader_state import undisturbed

SAMPLES, BATCH_SIZE, EPOCHS = 22, 4, 2


class Numbers(Dataset):
    """0, 1, 2, ... and, as augmentation would, a random number drawn for each."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.tensor([index, torch.randint(1000, ()).item()])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


LOADERS = {
    "in order": lambda: DataLoader(Numbers(), BATCH_SIZE),
    "shuffled": lambda: DataLoader(Numbers(), BATCH_SIZE, shuffle=True),
    "own generator": lambda: DataLoader(Numbers(), BATCH_SIZE, shuffle=True, generator=generator()),
    "sampler's generator": lambda: DataLoader(
        Numbers(), BATCH_SIZE, sampler=RandomSampler(Numbers(), generator=generator())
    ),
    "distributed sampler": lambda: DataLoader(
        Numbers(), BATCH_SIZE, sampler=DistributedSampler(Numbers(), num_replicas=2, rank=1)
    ),
    "workers": lambda: DataLoader(Numbers(), BATCH_SIZE, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        Numbers(), BATCH_SIZE, shuffle=True, num_workers=2, persistent_workers=True
    ),
}


def set_seeds() -> None:
    random.seed(3)
    numpy.random.seed(3)
    torch.manual_seed(3)


def train(loader) -> list:
    """What training sees: all batches of all epochs, and numbers drawn after each."""
    seen = []
    for epoch in range(EPOCHS):
        if isinstance(getattr(loader, "sampler", None), DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            batch = batch["number"] if isinstance(batch, dict) else batch
            seen.append(batch.tolist())
        seen.append([torch.rand(1).item(), numpy.random.rand(), random.random()])
    return seen


def peek(loader, batches: int | None) -> int:
    """Read some batches, or all twice; as a model with dropout would, draw random numbers."""
    read = 0
    for _ in range(1 if batches else 2):
        for _ in itertools.islice(loader, batches):
            torch.rand(3)
            read += 1
    numpy.random.rand()
    random.random()
    return read


@pytest.mark.parametrize("batches", [2, None], ids=["some", "all"])
@pytest.mark.parametrize("kind", LOADERS)
def test_order_of_a_torch_loader(kind, batches):
    set_seeds()
    expected = train(LOADERS[kind]())
    set_seeds()
    loader = LOADERS[kind]()
    with undisturbed(loader):
        assert peek(loader, batches) >= 2
    assert train(loader) == expected


@pytest.mark.parametrize("kind", ["shuffled", "own generator", "persistent workers"])
def test_without_it_the_order_changes(kind):
    """So that the test above shows something."""
    set_seeds()
    expected = train(LOADERS[kind]())
    set_seeds()
    loader = LOADERS[kind]()
    peek(loader, 2)
    assert train(loader) != expected


def test_random_states_are_put_back_also_after_an_error():
    loader = LOADERS["own generator"]()
    before = (torch.get_rng_state(), numpy.random.get_state(), random.getstate())
    own = loader.generator.get_state()
    with pytest.raises(KeyError), undisturbed(loader):
        peek(loader, 2)
        raise KeyError("x")
    assert torch.equal(torch.get_rng_state(), before[0])
    after = numpy.random.get_state()
    assert (after[1] == before[1][1]).all() and after[2:] == before[1][2:]
    assert random.getstate() == before[2]
    assert torch.equal(loader.generator.get_state(), own)


def test_a_samplers_epoch_is_put_back():
    loader = LOADERS["distributed sampler"]()
    loader.sampler.set_epoch(5)
    with undisturbed(loader):
        loader.sampler.set_epoch(9)
    assert loader.sampler.epoch == 5


def test_workers_that_were_running_go_on():
    loader = LOADERS["persistent workers"]()
    iter(loader)
    running = loader._iterator
    with undisturbed(loader):
        peek(loader, 1)
    assert loader._iterator is running


def test_anything_iterable_will_do():
    state = torch.get_rng_state()
    with undisturbed([torch.zeros(2)]):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """MDS shards of consecutive numbers, several of them so that shuffling moves blocks."""
    folder = tmp_path_factory.mktemp("mds") / "shards"
    with MDSWriter(out=str(folder), columns={"number": "int"}, size_limit=400) as writer:
        for number in range(SAMPLES):
            writer.write({"number": number})
    return folder


@pytest.fixture
def open_shards(shards, tmp_path):
    """A StreamingDataset over a copy of the shards: two over one folder are refused."""
    copies = itertools.count()

    def open_copy() -> StreamingDataset:
        folder = shutil.copytree(shards, tmp_path / str(next(copies)))
        return StreamingDataset(
            local=str(folder), shuffle=True, shuffle_seed=5, batch_size=BATCH_SIZE
        )

    return open_copy


STREAMING_LOADERS = {
    "torch": lambda dataset: DataLoader(dataset, BATCH_SIZE),
    "torch, workers": lambda dataset: DataLoader(dataset, BATCH_SIZE, num_workers=2),
    "torch, persistent workers": lambda dataset: DataLoader(
        dataset, BATCH_SIZE, num_workers=2, persistent_workers=True
    ),
    "streaming": lambda dataset: StreamingDataLoader(dataset, batch_size=BATCH_SIZE),
}


@pytest.mark.parametrize("batches", [2, None], ids=["some", "all"])
@pytest.mark.parametrize("kind", STREAMING_LOADERS)
def test_order_of_streaming_data(open_shards, kind, batches):
    make = STREAMING_LOADERS[kind]
    set_seeds()
    expected = train(make(open_shards()))
    epochs = [expected[: len(expected) // 2 - 1], expected[len(expected) // 2 : -1]]
    assert epochs[0] != epochs[1], "shuffling should differ by epoch"
    set_seeds()
    loader = make(open_shards())
    with undisturbed(loader):
        assert peek(loader, batches) >= 2
    assert train(loader) == expected


def test_without_it_the_order_of_streaming_data_changes(open_shards):
    make = STREAMING_LOADERS["torch"]
    set_seeds()
    expected = train(make(open_shards()))
    set_seeds()
    loader = make(open_shards())
    peek(loader, 2)
    assert train(loader) != expected


def test_order_of_a_resumed_streaming_run(open_shards):
    """Killed after two batches of the second epoch, resumed, assessed again."""

    def resume() -> StreamingDataLoader:
        loader = STREAMING_LOADERS["streaming"](open_shards())
        loader.load_state_dict(
            {
                "epoch": 1,
                "sample_in_epoch": 2 * BATCH_SIZE,
                "num_canonical_nodes": 1,
                "shuffle_seed": 5,
                "initial_physical_nodes": 1,
            }
        )
        return loader

    set_seeds()
    expected = train(resume())
    uninterrupted = train(STREAMING_LOADERS["streaming"](open_shards()))
    assert expected[0] == uninterrupted[len(uninterrupted) // 2 + 2]
    set_seeds()
    loader = resume()
    state = loader.state_dict()
    with undisturbed(loader):
        peek(loader, 2)
    assert loader.state_dict() == state
    assert train(loader) == expected


class Packing:
    """A collator that keeps what did not fit for the next batch."""

    def __init__(self):
        self.left_over: list[int] = []

    def __call__(self, samples):
        packed = self.left_over + [int(s) for s in samples]
        self.left_over = packed[3:]
        return packed[:3]


def test_what_a_collator_keeps_is_put_back():
    loaders = [DataLoader(list(range(8)), batch_size=4, collate_fn=Packing()) for _ in range(2)]
    with undisturbed(loaders[0]):
        list(loaders[0])
    assert list(loaders[0]) == list(loaders[1]) == [[0, 1, 2], [3, 4, 5]]
