"""Preparation for the demo: a tokenizer trained on the data itself, splits by shares."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apex_composer.data_prep.atomic_files import read_json
from apex_composer.data_prep.choose.few_documents import lay_out, read_sections
from apex_composer.data_prep.choose.job_plan import describe_source, hash_limit, source_differences
from apex_composer.data_prep.choose.splits import hash_text, make_ranges
from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.paths import MANIFEST
from apex_composer.data_prep.preparation import prepare
from apex_composer.data_prep.read.documents import read_documents
from apex_composer.data_prep.read.sources import Source, find_sources
from apex_composer.data_prep.tokens.tokenizer import (
    SMALLEST_VOCABULARY,
    save_tokenizer,
    train_tokenizer,
)
from apex_composer.data_prep.write.manifest import FORMAT, is_of_any_version
from apex_composer.demo import split

DEFAULTS = {
    "vocabulary_size": 4096,
    "sequence_length": 256,
    "validation_share": 0.05,
    "pretrain_share": 0.65,
    "text_limit": None,
    "tokenizer_sample": 8_000_000,
    "max_reject_rate": 0.001,
}


def prepare_from_scratch(
    data: Path | str,
    out: Path | str,
    *,
    vocabulary_size: int = DEFAULTS["vocabulary_size"],
    sequence_length: int = DEFAULTS["sequence_length"],
    validation_share: float = DEFAULTS["validation_share"],
    pretrain_share: float = DEFAULTS["pretrain_share"],
    text_limit: int | None = DEFAULTS["text_limit"],
    tokenizer_sample: int = DEFAULTS["tokenizer_sample"],
    max_reject_rate: float = DEFAULTS["max_reject_rate"],
    workers: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a tokenizer on the data, then write validation, pretrain and train with it.

    Args:
        data: folder of text, see `find_sources`.
        out: folder to write.
        vocabulary_size: tokens in the trained tokenizer at most; fewer where the text yields no
            more. Default: 4096.
        sequence_length: tokens in a training sequence. Default: 256.
        validation_share: share of documents held out. Default: 0.05.
        pretrain_share: share of documents for the base model. Default: 0.65.
        text_limit: bytes of text to take at most, shared equally among the domains; domains of
            few documents are taken whole (see `few_documents`). None takes everything.
            Default: None.
        tokenizer_sample: bytes of training text that the tokenizer learns from, shared equally
            among the domains. Default: 8,000,000.
        max_reject_rate: allowed share of unusable lines. Default: 0.001.
        workers: processes. Default: one for each core.
        overwrite: replace an earlier preparation. Default: False.

    Returns:
        The manifest.

    Raises:
        As `prepare`, and SettingsError for a vocabulary that cannot hold all bytes.
    """
    given = locals()
    options = make_options({name: given[name] for name in DEFAULTS})
    sources = find_sources(data)
    out = Path(out)
    folder = out.with_name(out.name + ".tokenizer")
    try:
        texts = training_texts(sources, options, tokenizer_sample)
        trained = train_tokenizer(texts, vocabulary_size)
        shutil.rmtree(folder, ignore_errors=True)
        save_tokenizer(trained, folder)
        return prepare(
            data, out, tokenizer=folder, options=options, workers=workers, overwrite=overwrite
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_options(settings: dict[str, Any]) -> Options:
    """Options of the preparation that the settings of this module stand for.

    Args:
        settings: all of DEFAULTS' names.

    Raises:
        SettingsError: a setting is out of range.
    """
    if settings["tokenizer_sample"] < 2 or settings["vocabulary_size"] < SMALLEST_VOCABULARY:
        raise SettingsError(
            f"tokenizer_sample={settings['tokenizer_sample']} must be at least 2 and "
            f"vocabulary_size={settings['vocabulary_size']} at least {SMALLEST_VOCABULARY}."
        )
    return Options(
        sequence_length=settings["sequence_length"],
        val_tokens=None,
        shares=split.make_shares(settings["validation_share"], settings["pretrain_share"]),
        text_limit=settings["text_limit"],
        max_reject_rate=settings["max_reject_rate"],
        tokenizer_training={
            name: settings[name] for name in ("vocabulary_size", "tokenizer_sample")
        },
    )


def is_prepared(data: Path | str, out: Path | str, **settings: Any) -> bool:
    """Tell whether `out` already holds what `prepare_from_scratch` would write.

    Args:
        data: folder of text.
        out: folder of the earlier preparation.
        settings: those that are not left at their defaults.
    """
    manifest = read_json(Path(out) / MANIFEST)
    if not is_of_any_version(manifest) or manifest["format"] != FORMAT:
        return False
    identity = make_options(DEFAULTS | settings).identity()
    if any(manifest["options"].get(name) != value for name, value in identity.items()):
        return False
    now = [describe_source(source) for source in find_sources(data)]
    return not source_differences(manifest["sources"], now)


def training_texts(sources: list[Source], options: Options, sample: int) -> Iterator[str]:
    """Yield documents of every domain that are not held out, up to its part of the sample.

    Args:
        sources: input files.
        options: of the preparation, with shares.
        sample: bytes of text of all domains together.
    """
    layout = lay_out(sources, options)
    kept = layout["kept"]
    held_out = make_ranges(options.shares, kept, layout["few"])[split.VALIDATION]
    room = dict.fromkeys(kept, sample // max(1, len(kept)))
    for source in sources:
        if source.domain is not None and room.get(source.domain, 1) <= 0:
            continue
        whole = read_documents(source, 0, None, lambda *reject: None)
        for document in read_sections(whole, layout["sections"]):
            domain, text = document.domain, document.text
            digest = hash_text(text)
            if room.get(domain, 0) <= 0 or digest >= hash_limit(kept, domain):
                if all(left <= 0 for left in room.values()):
                    return
                continue
            room[domain] -= len(text.encode("utf-8"))
            if not held_out.holds(domain, digest):
                yield text
