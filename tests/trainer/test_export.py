"""llm-foundry's HuggingFaceCheckpointer in the middle of a stage."""

import pytest
import torch
from composer.models import HuggingFaceModel
from composer_run import BATCH_SIZE
from helpers import TokenDataset
from tiny_run import SEQUENCE, VOCABULARY, write_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from apex_composer import APEX


@pytest.mark.numeric
def test_a_mid_stage_export_computes_what_the_trainer_computes(tmp_path):
    from composer import Callback, Trainer
    from llmfoundry.callbacks import HuggingFaceCheckpointer

    ids = TokenDataset(2, SEQUENCE, seed=5).ids
    found = {}

    class Logits(Callback):
        def batch_checkpoint(self, state, logger):
            if state.timestamp.batch.value == 3:
                weights = state.model.model.state_dict()
                found["weights"] = {name: weight.clone() for name, weight in weights.items()}
                with torch.no_grad():
                    found["logits"] = state.model.model.eval()(ids).logits
                state.model.train()

    write_model(tmp_path / "model")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = HuggingFaceModel(start, tokenizer=tokenizer, use_logits=True)
    apex = APEX(stages=["2ba", "2ba"], threshold=0.25)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TokenDataset(16, SEQUENCE), batch_size=BATCH_SIZE),
        optimizers=torch.optim.AdamW(model.parameters(), 1e-2),
        max_duration="4ba",
        algorithms=[apex],
        callbacks=[
            HuggingFaceCheckpointer(str(tmp_path / "saved"), "3ba", precision="float32"),
            Logits(),
        ],
        device="cpu",
        seed=17,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    exported = tmp_path / "saved" / "huggingface" / "ba3"
    plain = AutoModelForCausalLM.from_pretrained(exported)
    assert plain.config.vocab_size == VOCABULARY
    exported = plain.state_dict()
    assert exported.keys() == found["weights"].keys()
    for name, weight in found["weights"].items():
        assert torch.equal(exported[name], weight), name
    with torch.no_grad():
        error = (plain.eval()(ids).logits - found["logits"]).norm() / found["logits"].norm()
    # The same numbers in a file's buffer, where they are not aligned as in the trainer's tensors:
    # sums may be taken in another order, of some hundred terms that float32 rounds to 6e-8.
    assert error < 1e-5
    # Mid-stage: stage 1 began at batch 2, so at batch 3 operators had been trained.
    assert [record["start_batch"] for record in apex.history] == [0, 2]
