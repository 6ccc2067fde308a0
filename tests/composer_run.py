"""A short Composer run on a tiny Llama, and its data, as several tests need it."""

from types import SimpleNamespace

import torch
from composer import Algorithm, Callback, Trainer
from composer.core import Time, Timestamp, TimeUnit
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from helpers import TokenDataset, cross_entropy, tiny_llama
from streaming import StreamingDataset
from torch import Tensor
from torch.utils.data import DataLoader

from apex_composer import APEX

BATCH_SIZE = 4


class StreamedTokens(StreamingDataset):
    """MDS shards with a column `tokens` as model inputs."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(super().__getitem__(index)["tokens"].copy()).long()
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


class Batches(Callback):
    """Records the token ids of every training batch."""

    def __init__(self):
        self.ids = []

    def batch_start(self, state, logger):
        self.ids.append(state.batch["input_ids"].tolist())


class ExactLoss(HuggingFaceModel):
    """A Composer model whose loss stays in the model's dtype."""

    def forward(self, batch):
        return self.model(input_ids=batch["input_ids"])

    def loss(self, outputs, batch):
        return cross_entropy(outputs.logits, batch["labels"])


class StopAt(Callback):
    """Ends the fit at a batch, once."""

    def __init__(self, batch: int):
        self.batch: int | None = batch

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == self.batch:
            self.batch = None
            state.stop_training()


def assert_same_weights(first: dict, second: dict) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def make_trainer(
    *algorithms: Algorithm,
    model: torch.nn.Module | None = None,
    loader=None,
    callbacks: tuple = (),
    microbatch: int = BATCH_SIZE,
    max_duration: str = "6ba",
    seed: int = 17,
    lr: float = 1e-2,
    eps: float = 1e-8,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    settings: dict | None = None,
    eval_metrics: list | None = None,
    **options,
) -> Trainer:
    """A trainer with AdamW, or another optimizer of other settings, over 8 batches of tokens."""
    model = tiny_llama() if model is None else model
    own = {"use_logits": True, "eval_metrics": eval_metrics}
    wrapped = HuggingFaceModel(model, tokenizer=None, **own)
    if loader is None:
        loader = DataLoader(TokenDataset(8 * BATCH_SIZE), batch_size=BATCH_SIZE)
    return Trainer(
        model=wrapped,
        train_dataloader=loader,
        optimizers=optimizer(
            wrapped.parameters(), **(settings or {"lr": lr, "eps": eps, "weight_decay": 0.1})
        ),
        max_duration=max_duration,
        algorithms=list(algorithms),
        callbacks=list(callbacks),
        device_train_microbatch_size=microbatch,
        device="cpu",
        seed=seed,
        progress_bar=False,
        **options,
    )


def run(*algorithms: Algorithm, **options) -> tuple[APEX | None, dict, InMemoryLogger]:
    """Train; returns the APEX algorithm, the final weights and the in-memory log."""
    log = InMemoryLogger()
    trainer = make_trainer(*algorithms, loggers=[log], **options)
    trainer.fit()
    weights = {n: t.clone() for n, t in trainer.state.model.model.state_dict().items()}
    trainer.close()
    apex = next((a for a in algorithms if isinstance(a, APEX)), None)
    return apex, weights, log


def final_scores(apex: APEX) -> dict:
    """Scores, norm sums and sample counts collected in the last stage."""
    return apex._expander.state_dict()["scores"]


def assert_same_scores(first: dict, second: dict) -> None:
    """For forward passes in float64, of one batch in other pieces: no rounding changes a rank."""
    assert first.keys() == second.keys() and first
    for name in first:
        assert torch.equal(first[name][0], second[name][0]), name
        torch.testing.assert_close(first[name][1], second[name][1], rtol=1e-11, atol=0)
        assert first[name][2] == second[name][2]


def state_of(max_duration: str, dataloader_len: int | None = None, **time):
    """As much of Composer's State as stages look at."""
    return SimpleNamespace(
        max_duration=Time.from_timestring(max_duration),
        dataloader_len=None if dataloader_len is None else Time(dataloader_len, TimeUnit.BATCH),
        timestamp=Timestamp(**time),
    )
