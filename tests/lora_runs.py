"""Tiny models with peft's LoRA, and Composer runs that train them."""

from pathlib import Path

import torch
from composer import Trainer
from composer_run import BATCH_SIZE, ExactLoss
from helpers import TokenDataset, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader

ALL_LINEAR = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def lora_llama(dtype: torch.dtype = torch.float64, model=None, **changed) -> PeftModel:
    """A tiny Llama with LoRA on all linear layers; peft_type as llm-foundry's YAMLs give it."""
    model = tiny_llama(dtype=dtype) if model is None else model
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", **ALL_LINEAR | changed)
    config.peft_type = "LORA"
    return get_peft_model(model, config)


def make_lora_trainer(
    *algorithms, model: PeftModel | None = None, whole: bool = True, lr: float = 1e-2, **options
) -> Trainer:
    """A trainer over 8 batches of tokens, whose checkpoints hold the whole model."""
    model = lora_llama() if model is None else model
    wrapped = ExactLoss(model, tokenizer=None, use_logits=True, should_save_peft_only=not whole)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    settings = {
        "train_dataloader": DataLoader(TokenDataset(8 * BATCH_SIZE), batch_size=BATCH_SIZE),
        "optimizers": torch.optim.AdamW(trained, lr, weight_decay=0.1),
        "max_duration": "7ba",
        "device": "cpu",
        "seed": 17,
        "progress_bar": False,
    }
    return Trainer(model=wrapped, algorithms=list(algorithms), **settings | options)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def checkpoint(folder: Path, batch: int) -> str:
    """The checkpoint of that batch in a folder."""
    (found,) = folder.glob(f"*-ba{batch}-rank0.pt")
    return str(found)
