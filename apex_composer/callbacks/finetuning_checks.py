"""What llm-foundry's finetuning loaders do not check: packing, and data of another run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apex_composer.data_prep.instruct.manifest import all_sources, read_instruct_manifest
from apex_composer.data_prep.paths import TOKENIZER_FOLDER
from apex_composer.data_prep.tokens.tokenizer import hash_backend

Settings = Mapping[str, Any]


def finetuning_datasets(config: Settings) -> Iterator[tuple[str, Settings]]:
    """The datasets of a run's finetuning loaders, each with its place in the YAML.

    Args:
        config: llm-foundry's configuration of the run.
    """
    for section in ("train_loader", "eval_loader", "eval_loaders"):
        loaders = config.get(section) or []
        for loader in [loaders] if isinstance(loaders, Mapping) else loaders:
            if loader.get("name") == "finetuning":
                yield f"{section}.dataset", loader["dataset"]


def check_packing(config: Settings) -> None:
    """Refuse packed examples in a model that lets them see each other, which nothing would tell.

    `hf_causal_lm` hands no `sequence_id` on to transformers, `mpt_causal_lm` uses it if it is told.

    Args:
        config: llm-foundry's configuration of the run.

    Raises:
        ValueError: naming the loader, and what to do.
    """
    model = config.get("model") or {}
    told = (model.get("attn_config") or {}).get("attn_uses_sequence_id", False)
    ways = {
        "hf_causal_lm": "",
        "mpt_causal_lm": ", or set model.attn_config.attn_uses_sequence_id: true",
    }
    if model.get("name") not in ways or (model["name"] == "mpt_causal_lm" and told):
        return
    for place, dataset in finetuning_datasets(config):
        ratio = dataset.get("packing_ratio")
        if ratio not in (None, 1):
            raise ValueError(
                f"{place}.packing_ratio: got {ratio}, but the examples in a row would see each "
                f"other in this {model['name']}. Leave packing_ratio out and set pad_to_longest: "
                f"true{ways[model['name']]}"
            )


def check_examples(config: Settings) -> None:
    """Refuse what `apex-composer prep-instruct` has prepared for another run.

    Its manifest is looked for in every folder that a finetuning loader reads (`hf_name`); data
    without one, of another origin or in a remote store, pass.

    Args:
        config: llm-foundry's configuration of the run.

    Raises:
        ValueError: examples would be cut, or tokenised in another way than they were counted.
    """
    for place, dataset in finetuning_datasets(config):
        folder = Path(dataset.get("hf_name") or "-")  # MDS shards have none
        manifest = read_instruct_manifest(folder)
        if manifest is None:
            continue
        longest = max(counts["longest"] for counts in all_sources(manifest["splits"]).values())
        length = dataset["max_seq_len"]
        wrong = list(_differences(folder / TOKENIZER_FOLDER, config.get("tokenizer") or {}))
        if length < longest:
            wrong.append(
                f"its longest example has {longest} tokens, max_seq_len is {length}: longer ones "
                "would be cut or dropped"
            )
        if wrong:
            raise ValueError(
                f"{place}: the data in {folder} do not fit this run: {'; '.join(wrong)}. Set "
                f"tokenizer.name: {folder / TOKENIZER_FOLDER}, and max_seq_len to {longest} or "
                "more; or prepare the data again (apex-composer prep-instruct)"
            )


def _differences(folder: Path, settings: Settings) -> Iterator[str]:
    """How a run's tokenizer reads conversations otherwise than that of the data."""
    from llmfoundry.utils.builders import build_tokenizer

    if not folder.is_dir():
        yield f"{folder} is gone, to which the run's tokenizer would be compared"
        return
    # llm-foundry changes what it is given.
    kwargs = dict(settings.get("kwargs") or {})
    ours = _describe(build_tokenizer(str(folder), {}))
    for name, other in _describe(build_tokenizer(settings["name"], kwargs)).items():
        if other != ours[name]:
            yield f"the tokenizer {settings['name']} has another {name}"


def _describe(tokenizer: Any) -> dict[str, Any]:
    """What decides the tokens of an example, by the words for it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    return {
        "vocabulary": None if backend is None else hash_backend(backend.to_str()),
        "chat template": tokenizer.chat_template,
        "eos": tokenizer.eos_token_id,
        "beginning or end of texts": tokenizer("a")["input_ids"],
    }
