"""Instruction data as Tulu V2's files have it, and the tokenizers to read it with."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from backends import BACKENDS
from corpus import sentences, write_jsonl
from transformers import PreTrainedTokenizerFast

from apex_composer.data_prep import InstructOptions, prepare_instruct

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKS = {"byte level": ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")}
LENGTH = 128


@cache
def tokenizer_folder(kind: str = "byte level", template: str | None = None) -> Path:
    """A tokenizer of backends.BACKENDS, which puts bos before a text, as a base model's folder."""
    bos, eos, pad = MARKS.get(kind, ("<s>", "</s>", None))
    backend = BACKENDS[kind].__class__.from_str(BACKENDS[kind].to_str())
    if backend.post_processor is None:
        from tokenizers.processors import TemplateProcessing

        marks = [(bos, backend.token_to_id(bos))]
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=marks)
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "chat_template": template}
    folder = Path(mkdtemp(prefix="apex-test-tokenizer-"))
    given = {name: value for name, value in names.items() if value is not None}
    PreTrainedTokenizerFast(tokenizer_object=backend, **given).save_pretrained(folder)
    return folder


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of users and assistants in turns."""
    roles = [("user", "assistant")[place % 2] for place in range(len(contents))]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def tulu_line(number: int) -> dict[str, Any]:
    """A record of the mixture's shape: one turn or two, some with a system message."""
    source = ("flan_v2", "open_orca", "lima")[number % 3]
    words = sentences(number, 40).split(" ")
    contents = [
        " ".join(words[:7]),
        " ".join(words[7 : 9 + number % 5]) + "\n- \u00e9\u2028\u6f22.",
    ]
    if source == "lima":
        contents += ["And " + " ".join(words[20:23]) + "?", " ".join(words[23:27])]
    system = "You answer in short.\n" if source == "open_orca" else None
    return {
        "dataset": source,
        "id": f"{source}_{number}",
        "messages": chat(*contents, system=system),
    }


def pair_line(number: int) -> dict[str, str]:
    """A prompt with its response."""
    return {"prompt": sentences(number, 5) + "\n", "response": sentences(1000 + number, 4)}


def write_records(path: Path, records: list[dict | bytes]) -> Path:
    """Write jsonl, compressed by its suffix."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    return write_jsonl(path, lines)


def instruct(input: Path, out: Path, *, kind: str = "byte level", **changes: Any) -> dict[str, Any]:
    """Prepare instruction data in this process, with many pieces."""
    template = changes.pop("template", None)
    run = {"workers": changes.pop("workers", 1), "overwrite": changes.pop("overwrite", False)}
    run["engine"] = changes.pop("engine", "local")
    given = {"sequence_length": LENGTH, "validation_share": 0.2, "piece_bytes": 2000} | changes
    tokenizer = tokenizer_folder(kind, template)
    return prepare_instruct(
        input, out, tokenizer=tokenizer, options=InstructOptions(**given), **run
    )


def written(out: Path, split: str = "train") -> list[dict[str, Any]]:
    """The examples of a split's file."""
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_bytes().splitlines()]


def rejects(out: Path) -> list[dict[str, Any]]:
    """The lines of `rejects.jsonl`."""
    return [json.loads(line) for line in (out / "rejects.jsonl").read_bytes().splitlines()]
