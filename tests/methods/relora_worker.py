"""Trains with ReLoRA on two CPU processes: `test_relora_ranks.py` starts it with a folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "trainer"))

import cpu_fsdp
import torch
from composer import Trainer
from composer.utils import FSDP2Config, dist
from composer_run import BATCH_SIZE, ExactLoss
from forks import fork_ranks
from helpers import TokenDataset
from llmfoundry.models.hf.hf_fsdp import prepare_hf_model_for_fsdp
from lora_runs import lora_llama
from sharded_loop import whole_weights
from torch.utils.data import DataLoader

from apex_composer.methods.relora import ReLoRA


def train(mode: str, **options) -> dict[str, torch.Tensor]:
    """Seven batches with restarts after the third and the sixth; the weights."""
    model = lora_llama(r=3)  # does not split evenly
    prepare_hf_model_for_fsdp(model, "cpu")  # each A and B by itself, in the layers
    wrapped = ExactLoss(model, tokenizer=None, use_logits=True, should_save_peft_only=False)
    dataset = TokenDataset(8 * BATCH_SIZE)
    sampler = dist.get_sampler(dataset, shuffle=False, drop_last=False)
    fsdp = FSDP2Config(state_dict_type="sharded", mixed_precision="FULL")
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    trainer = Trainer(
        model=wrapped,
        train_dataloader=DataLoader(dataset, BATCH_SIZE // dist.get_world_size(), sampler=sampler),
        eval_dataloader=DataLoader(dataset, BATCH_SIZE, sampler=dist.get_sampler(dataset)),
        eval_interval="1ba",  # FSDP2 then has weights gathered
        eval_subset_num_batches=1,
        optimizers=torch.optim.AdamW(trained, 1e-2, weight_decay=0.1),
        max_duration="7ba",
        algorithms=[ReLoRA(interval="3ba", t_warmup="2ba", prune=0.5)],
        parallelism_config={"fsdp": fsdp} if mode == "fsdp2" else None,
        device="cpu",
        seed=17,
        progress_bar=False,
        **options,
    )
    trainer.fit()
    found = whole_weights(getattr(trainer.state.model, "module", trainer.state.model))
    trainer.close()
    return found


def one_rank(folder: Path) -> None:
    dist.initialize_dist("cpu")
    cpu_fsdp.patch()
    if dist.get_world_size() == 1:
        torch.save({"plain": train("plain")}, folder / "1-0.pt")
        return
    ends = {"ddp": train("ddp")}
    ends["fsdp2"] = train("fsdp2", save_folder=str(folder / "saved"), save_interval="3ba")
    ends["resumed"] = train("fsdp2", load_path=str(folder / "saved" / "ep0-ba3"))
    torch.save(ends, folder / f"2-{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for count in (1, 2):
        if any(fork_ranks(count, one_rank, Path(sys.argv[1]))):
            sys.exit("a rank has failed")
