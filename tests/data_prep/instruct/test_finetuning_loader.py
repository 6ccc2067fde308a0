"""What is written goes through llm-foundry's own finetuning loader: all of it, and nothing else.

Packed rows: which models keep their examples apart, and what the ranking counts as a sample.
"""

from pathlib import Path

import pytest
import torch
from chats import LENGTH, instruct, pair_line, tulu_line, write_records, written
from composer.models import HuggingFaceModel
from helpers import tiny_llama
from llmfoundry.data.dataloader import build_dataloader
from llmfoundry.data.packing import BinPackCollator
from llmfoundry.models.mpt import ComposerMPTCausalLM
from llmfoundry.utils.builders import build_tokenizer
from omegaconf import OmegaConf

from apex_composer import Expander, find_sites
from apex_composer.trainer.batches import look_at, sequence_ids

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of datasets and llm-foundry

PAGE = Path(__file__).parents[3] / "docs" / "instruct.md"


def load(out, loader="train_loader", **dataset):
    """The tokenizer and a loader of the page's YAML, read in this process, 4 samples a batch."""
    lines = PAGE.read_text().split("```yaml\n")[1].split("```")[0]
    changed = {"variables": {"data": str(out)}, "max_seq_len": LENGTH}
    config = OmegaConf.merge(OmegaConf.create(lines), changed)
    config = OmegaConf.to_container(config, resolve=True)
    tokenizer = build_tokenizer(config["tokenizer"]["name"], config["tokenizer"]["kwargs"])
    loader = config[loader] | {"num_workers": 0, "prefetch_factor": None, "drop_last": False}
    loader |= {"persistent_workers": False, "pin_memory": False}
    loader["dataset"] |= dataset | {"hf_kwargs": {"cache_dir": str(out.parent / "cache")}}
    return tokenizer, build_dataloader(loader, tokenizer, device_batch_size=4).dataloader


def trained_on(batches, tokenizer):
    """The examples of batches, packed or not: (text, texts that are trained) of each, sorted."""
    found = []
    for batch in batches:
        rows = [batch[name].tolist() for name in ("input_ids", "labels", "sequence_id")]
        for ids, labels, sequences in zip(*rows, strict=True):
            for sequence in sorted(set(sequences) - {-1}):
                places = [place for place, one in enumerate(sequences) if one == sequence]
                assert places == list(range(places[0], places[-1] + 1))
                answers, last = [], None
                for place in places:
                    if labels[place] == -100:
                        continue
                    assert labels[place] == ids[place]
                    answers += [[]] if last != place - 1 else []
                    answers[-1].append(ids[place])
                    last = place
                whole = tokenizer.decode([ids[place] for place in places])
                found.append((whole, tuple(map(tokenizer.decode, answers))))
    return sorted(found)


def expected_of(examples, tokenizer):
    """What shall be trained: every answer to its eos, and nothing that anybody else has said."""
    expected = []
    for example in examples:
        if "messages" in example:
            answers = [m["content"] for m in example["messages"] if m["role"] == "assistant"]
            whole = tokenizer.apply_chat_template(example["messages"], tokenize=False)
        else:
            answers = [example["response"]]
            whole = tokenizer.bos_token + "".join(example.values()) + tokenizer.eos_token
        expected.append((whole, tuple(answer + tokenizer.eos_token for answer in answers)))
    return sorted(expected)


@pytest.fixture(scope="module", params=["messages", "prompt and response"])
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader") / "test data"  # names that `datasets` could misread
    make_line = tulu_line if request.param == "messages" else pair_line
    write_records(folder / "in" / "tulu.jsonl", [make_line(number) for number in range(40)])
    manifest = instruct(folder / "in", folder / "out")
    assert list(manifest["kinds"]) == [request.param]
    return folder / "out", manifest


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("pad_to_longest", [True, False])
def test_the_loader_trains_on_every_answer_and_drops_none(prepared, split, pad_to_longest):
    out, manifest = prepared
    loader = {"train": "train_loader", "validation": "eval_loader"}[split]
    tokenizer, loader = load(out, loader, pad_to_longest=pad_to_longest)
    batches = list(loader)
    widths = {batch["input_ids"].shape[1] for batch in batches}
    assert max(widths) < LENGTH if pad_to_longest else widths == {LENGTH}
    assert trained_on(batches, tokenizer) == expected_of(written(out, split), tokenizer)
    counts = manifest["splits"][split].values()
    numbers = {name: sum(c[name] for c in counts) for name in ("tokens", "response_tokens")}
    assert numbers["tokens"] == sum(int(b["attention_mask"].sum()) for b in batches)
    assert numbers["response_tokens"] == sum(int((b["labels"] != -100).sum()) for b in batches)
    longest = max(int(b["attention_mask"].sum(1).max()) for b in batches)
    assert longest == max(one["longest"] for one in counts) <= LENGTH


def test_packing_trains_on_the_same_and_keeps_the_rest_for_later(prepared):
    out, manifest = prepared
    tokenizer, loader = load(out, packing_ratio=2.0, pad_to_longest=False)
    batches = list(loader)
    assert any(look_at(batch).packed for batch in batches)
    # The collator carries what did not fit into the next batch, and past the last one.
    packer = loader.collate_fn.base_collator
    assert isinstance(packer, BinPackCollator)
    left = [example for _, example in packer._leftover_bins]
    assert bool(left) == ("messages" in manifest["kinds"])  # the others are short
    batches += [{name: value[None] for name, value in example.items()} for example in left]
    assert trained_on(batches, tokenizer) == expected_of(written(out), tokenizer)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed batch of chats, and its examples in rows of their own."""
    folder = tmp_path_factory.mktemp("packed")
    write_records(folder / "in.jsonl", [tulu_line(number) for number in range(24)])
    instruct(folder / "in.jsonl", folder / "out", validation_share=0)
    tokenizer, loader = load(folder / "out", packing_ratio=2.0, pad_to_longest=False)
    batch = next(iter(loader))
    rows = []
    for ids, sequences in zip(batch["input_ids"], batch["sequence_id"], strict=True):
        rows += [ids[sequences == n] for n in range(int(sequences.max()) + 1)]
    assert len(rows) > len(batch["input_ids"])
    alone = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.zeros_like(alone, dtype=torch.bool)
    for number, row in enumerate(rows):
        mask[number, : len(row)] = True
    return tokenizer, batch, {"input_ids": alone, "attention_mask": mask}


def mpt(tokenizer, **attention):
    """llm-foundry's MPT as a YAML builds it."""
    torch.manual_seed(0)
    return ComposerMPTCausalLM(
        tokenizer=tokenizer,
        d_model=32,
        n_heads=4,
        n_layers=2,
        expansion_ratio=2,
        max_seq_len=LENGTH,
        vocab_size=len(tokenizer),
        attn_config={"attn_impl": "torch", **attention},
        loss_fn="torch_crossentropy",
    ).eval()


def logits_of_examples(model, packed_batch, alone):
    """Logits of the same tokens in packed rows and in rows of their own."""
    with torch.no_grad():
        inside = model(packed_batch)["logits"][packed_batch["sequence_id"] >= 0]
        apart = model(alone)["logits"][alone["attention_mask"]]
    return inside, apart


ALIBI = {"alibi": True}
ROPE = {"rope": True, "rope_impl": "hf", "rope_hf_config": {"type": "no_scaling", "factor": 1.0}}


@pytest.mark.parametrize("positions", [ALIBI, ROPE], ids=["alibi", "rope"])
def test_examples_in_a_row_do_not_see_each_other_in_an_mpt_that_is_told(packed, positions):
    tokenizer, batch, alone = packed
    told = mpt(tokenizer, attn_uses_sequence_id=True, **positions)
    torch.testing.assert_close(*logits_of_examples(told, batch, alone), rtol=1e-3, atol=1e-4)
    # Without the setting they do, so the comparison above means something.
    inside, apart = logits_of_examples(mpt(tokenizer, **positions), batch, alone)
    assert not torch.allclose(inside, apart, rtol=1e-1, atol=1e-2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_examples_in_a_row_see_each_other_in_a_hugging_face_model(packed, implementation):
    """As docs/instruct.md says: on its way to transformers `sequence_id` is left out."""
    tokenizer, batch, alone = packed
    llama = tiny_llama()
    llama.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    llama.config._attn_implementation = implementation
    model = HuggingFaceModel(llama, tokenizer=tokenizer).eval()
    inside, apart = logits_of_examples(model, batch, alone)
    assert not torch.allclose(inside, apart, rtol=1e-1, atol=1e-2)
    # The first example of a row has nobody before it.
    firsts = batch["sequence_id"][batch["sequence_id"] >= 0] == 0
    torch.testing.assert_close(inside[firsts], apart[firsts], rtol=1e-3, atol=1e-4)


@pytest.mark.numeric
def test_every_packed_example_is_a_sample_of_the_ranking(packed):
    tokenizer, batch, alone = packed
    assert sequence_ids(batch) is batch["sequence_id"]
    # In float64: in float32 rounding could change a rank.
    model = mpt(tokenizer, attn_uses_sequence_id=True, alibi=True).double()
    totals = []
    for inputs, ids in ((batch, batch["sequence_id"]), (alone, None)):
        expander = Expander(find_sites(model.model), threshold=0.25, seed=0)
        with torch.no_grad(), expander.assessing(inputs["attention_mask"].bool(), ids):
            model(inputs)
        totals.append(expander.assessment.totals())
        expander.remove()
    packed_totals, expected = totals
    for name, total in expected.items():
        assert torch.equal(packed_totals[name].scores, total.scores), name
        assert packed_totals[name].samples == total.samples == len(alone["input_ids"])
