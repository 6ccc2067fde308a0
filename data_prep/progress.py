"""Progress bars: one for everything, and that of phase 1, which does not know how far it is.

`progress_bar` needs nothing but tqdm, so any part of the project may use it.
"""

import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Between two states of a bar that goes to a file or a pipe, where every state stays.
SECONDS_IN_LOGS = 30.0
# Characters in a stored byte of an archive, until one is finished.
TYPICAL_RATIO = 3.0


def progress_bar(*iterable: Any, **options: Any) -> tqdm:
    """A bar on a terminal, and a line now and then everywhere else.

    Args:
        iterable: what is gone through, if anything.
        options: those of tqdm, such as `total`, `desc`, `unit` and `delay`.
    """
    seconds = 0.1 if sys.stderr.isatty() else SECONDS_IN_LOGS
    return tqdm(*iterable, mininterval=seconds, maxinterval=max(10.0, seconds), **options)


class ReadingBar:
    """Progress of phase 1, in bytes of the files as stored.

    Args:
        pieces: name of the source and bytes of every piece that is still to be done.
        done_bytes: bytes of the pieces that an earlier run finished. Default: 0.
    """

    def __init__(self, pieces: list[tuple[str, int]], done_bytes: int = 0) -> None:
        self.open = Counter(path for path, _ in pieces)
        self.files = len(self.open)
        self.counts: Counter[str] = Counter()
        # Of unfinished and of finished pieces, by the suffix of their file.
        self.reading: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self.started = time.monotonic()
        total = done_bytes + sum(size for _, size in pieces)
        self.bar = progress_bar(
            total=total, initial=done_bytes, unit="B", unit_scale=True, desc="tokenising"
        )

    def advance(self, news: Mapping[str, Any]) -> None:
        """Take a worker's news.

        Args:
            news: documents, tokens and characters since its last news, and its source.
        """
        self.counts.update({name: news[name] for name in ("documents", "tokens")})
        self.reading[Path(news["source"]).suffix] += news["characters"]
        self._show()

    def finish_piece(self, source: str, stored: int, characters: int) -> None:
        """Count a finished piece.

        Args:
            source: name of its file.
            stored: bytes of it as stored.
            characters: those of its documents.
        """
        kind = Path(source).suffix
        self.open -= Counter([source])  # a source without pieces leaves it
        self.reading[kind] -= characters
        self.bytes[kind] += stored
        self.characters[kind] += characters
        self._show()

    def _stored(self, kind: str) -> float:
        """Bytes of unfinished pieces that are read: a guess, an archive does not tell."""
        ratio = 1.0 if kind == ".jsonl" else TYPICAL_RATIO
        if self.bytes[kind] and self.characters[kind]:
            ratio = self.characters[kind] / self.bytes[kind]
        return self.reading[kind] / ratio

    def _show(self) -> None:
        position = self.bar.initial + self.bytes.total() + sum(map(self._stored, self.reading))
        rate = self.counts["tokens"] / max(1e-9, time.monotonic() - self.started)
        self.bar.set_postfix_str(
            f"{self.files - len(self.open)}/{self.files} files, "
            f"{self.counts['documents']:,} documents, {self.counts['tokens']:,} tokens, "
            f"{rate:,.0f} tokens/s",
            refresh=False,
        )
        self.bar.update(max(0, min(position, self.bar.total) - self.bar.n))

    def close(self, whole: bool) -> None:
        """End the bar.

        Args:
            whole: whether all pieces are done.
        """
        if whole:
            self.bar.update(self.bar.total - self.bar.n)
        self.bar.close()
