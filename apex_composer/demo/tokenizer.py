"""A byte-level BPE tokenizer, trained on the text that the demo's models learn from."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
# Not EOS: collators mask the padding token out of the loss, and EOS has to be learned.
PAD = "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> "Tokenizer":
    """Train byte-level BPE; the same texts in the same order give the same tokenizer.

    Args:
        texts: training documents only, so that nothing is learned from the validation ones.
        vocabulary_size: number of tokens, special ones included; at least 259. Texts in which no
            two tokens are left to be joined give fewer.

    Raises:
        ValueError: the vocabulary cannot hold all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if vocabulary_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocabulary_size={vocabulary_size} is too small: the 256 bytes and the special tokens "
            f"{', '.join(SPECIAL_TOKENS)} need {SMALLEST_VOCABULARY}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    # Prompts then start as the training documents do.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    # The markers are ours: a document that spells one out must not end another document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Save a tokenizer as a folder that `AutoTokenizer.from_pretrained` loads.

    Args:
        tokenizer: trained tokenizer.
        folder: created when missing.
    """
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # generate() refuses any others
    )
    fast.save_pretrained(folder)
