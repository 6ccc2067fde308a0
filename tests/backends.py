"""Small tokenizers of the families that LLMs use."""

import json

from corpus import sentences
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from apex_composer.data_prep.tokens.word_encoder import BLANK
from apex_composer.demo.tokenizer import train_tokenizer

TEXTS = [sentences(seed) for seed in range(60)]
TEXTS += [
    "def f(x_1):\n    return x_1 + 10, 'it\u2019s', \"don't\"\n\n\n" * 3,
    "über  naïve\t\n",
] * 5


def byte_level():
    return train_tokenizer(TEXTS, 400)


def sentencepiece(kind="prepend", joins_kinds=True, **model_changes):
    """What Llama's `tokenizer.json` holds, with a small vocabulary.

    Llama's own has no tokens of letters and signs or digits together (`joins_kinds=False`).
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK)
    if not joins_kinds:
        kinds = Regex(f"{BLANK}?(?:\\p{{L}}+|\\p{{N}}+|[^{BLANK}\\p{{L}}\\p{{N}}]+)")
        apart = pre_tokenizers.Split(kinds, "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, apart])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [t for t in parts["added_tokens"] if "0x" not in t["content"]]
    parts["model"] |= {"byte_fallback": True, "fuse_unk": True} | model_changes
    parts["pre_tokenizer"] = None
    if kind == "prepend":
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
        steps = [{"type": "Prepend", "prepend": BLANK}, replace]
        parts["normalizer"] = {"type": "Sequence", "normalizers": steps}
    else:
        names = {"replacement": BLANK, "prepend_scheme": kind, "split": False}
        parts["pre_tokenizer"] = {"type": "Metaspace"} | names
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.encode_special_tokens = True
    return tokenizer


BACKENDS = {
    "byte level": byte_level(),
    "prepend": sentencepiece(),
    "kinds apart": sentencepiece(joins_kinds=False),
    "always": sentencepiece("always"),
    "first": sentencepiece("first"),
}
