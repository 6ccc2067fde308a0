"""Read texts for evaluation and observation: jsonl or MDS, one folder for each domain."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_composer.data_prep.instruct.preparation import find_jsonl
from apex_composer.data_prep.paths import INDEX, MANIFEST, REJECTS
from apex_composer.data_prep.read.formats import JSONL
from apex_composer.data_prep.read.sources import Source
from apex_composer.evaluate.jsonl_samples import Cut, Reader
from apex_composer.evaluate.samples import Rows, Sample, share_out
from apex_composer.evaluate.token_shards import TokenShards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """Texts as samples.

    Args:
        domains: samples by the domain's name.
        left_out: how many records were left out, by reason.
    """

    domains: dict[str, Sequence[Sample]]
    left_out: dict[str, int] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Hash of all samples and their domains: the same texts have it in jsonl and in MDS."""
        digest = hashlib.sha256()
        for name, samples in sorted(self.domains.items()):
            for tokens, answer in samples:
                where = None if answer is None else (answer.start, answer.stop)
                digest.update(f"{name} {len(tokens)} {where}\n".encode())
                digest.update(tokens.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def read_texts(
    source: Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    samples: int | None = None,
    seed: int = 17,
    cut: Cut = "sequences",
) -> Texts:
    """Read texts as samples, domain by domain.

    jsonl holds documents (`text`), or prompts with responses or chats (as `apex-composer
    prep-instruct` reads them): each answer is a sample, with what stands before it. MDS holds
    tokens, as `apex-composer prep` and llm-foundry write them. A folder with sub-folders has a
    domain in each, any other folder or file is one domain, called by its own name.

    Of `samples` each domain gets its share of all there are, by the largest remainder, one at
    least, so that the total stays that of the whole. Which ones is decided by a hash of seed,
    domain and place, on every machine alike.

    Args:
        source: jsonl file (plain, .gz, .zst), a folder of such, or an MDS folder.
        tokenizer: the model's, a fast one.
        sequence_length: tokens of a sample at most.
        samples: how many at most. Default: all.
        seed: of the choice. Default: 17.
        cut: what becomes of documents. `sequences`: all of a domain laid end to end as prep does it
            (bos and eos around each) and cut, what perplexity is measured on; the last one is
            shorter, where prep leaves it out. `documents`: the beginning of each. MDS is cut
            already, answers are never cut. Default: sequences.

    Raises:
        FileNotFoundError, ValueError: there are no texts, or they do not fit the tokenizer.
    """
    source = Path(source)
    _check(tokenizer, sequence_length, samples, cut)
    _check_split(source)
    left_out: Counter[str] = Counter()
    if folders := _find_mds(source):
        found = {
            name: Rows(TokenShards(folder, tokenizer, sequence_length))
            for name, folder in folders.items()
        }
    else:
        reader = Reader(tokenizer, sequence_length, samples, seed, cut, left_out)
        found = {name: reader.read(name, files) for name, files in _find_jsonl(source).items()}
    empty = [name for name, rows in found.items() if not rows.total]
    if empty:
        told = f" Left out: {_told(left_out)}." if left_out else ""
        raise ValueError(f"{source} has no text in {', '.join(empty)}.{told}")
    if left_out:
        log.warning("%s: left out %s", source, _told(left_out))
    shares = share_out({name: rows.total for name, rows in found.items()}, samples)
    domains = {name: rows.choose(name, shares[name], seed) for name, rows in found.items()}
    return Texts(domains, dict(left_out))


def _check(tokenizer: Any, sequence_length: int, samples: int | None, cut: str) -> None:
    if cut not in ("sequences", "documents"):
        raise ValueError(f"cut={cut!r} must be sequences or documents")
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length} must be 2 at least")
    if samples is not None and samples < 1:
        raise ValueError(f"samples={samples} must be 1 at least")
    if not getattr(tokenizer, "is_fast", False) or tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no fast version (tokenizer.json), or no "
            "eos token, which ends every document: give a model with such a tokenizer"
        )


def _check_split(source: Path) -> None:
    """Training and validation data side by side are no two domains."""
    if not (source / MANIFEST).is_file():
        return
    splits = sorted(
        path.name
        for path in source.iterdir()
        if (path / INDEX).is_file() or path.name.endswith(JSONL)
    )
    splits = [name for name in splits if name != REJECTS]
    raise ValueError(f"{source} holds prepared data: give one split of it: {', '.join(splits)}")


def _find_mds(source: Path) -> dict[str, Path]:
    """MDS folders by their domains; none where it is jsonl."""
    if not source.is_dir():
        return {}
    below = {path.name: path for path in sorted(source.iterdir()) if (path / INDEX).is_file()}
    if not below and (source / INDEX).is_file():
        below = {source.resolve().name: source}
    if below and (others := [p.name for p in source.iterdir() if p.name.endswith(JSONL)]):
        raise ValueError(f"{source} holds MDS and jsonl ({others[0]}): give one of them")
    return below


def _find_jsonl(source: Path) -> dict[str, list[Source]]:
    files = find_jsonl(source)
    if source.is_file():
        name = next(source.name.removesuffix(s) for s in JSONL if source.name.endswith(s))
        return {name: files}
    places = [Path(file.path).relative_to(source).parts for file in files]
    deep = [len(parts) > 1 for parts in places]
    if not any(deep):
        return {source.resolve().name: files}
    if not all(deep):
        outside = files[deep.index(False)].path
        raise ValueError(f"{outside} lies outside of the domains' folders: move it into one")
    domains: dict[str, list[Source]] = {}
    for parts, file in zip(places, files, strict=True):
        domains.setdefault(parts[0], []).append(file)
    return domains


def _told(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in sorted(left_out.items()))
