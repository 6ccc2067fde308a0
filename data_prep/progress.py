"""Progress bars; of phase 1: files, documents, tokens, tokens per second, and the time left."""

import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

COMPRESSED = (".gz", ".zst", ".parquet")
# Between two states of a bar that goes to a file or a pipe, where every state stays.
SECONDS_IN_LOGS = 30.0
# Text in a stored byte of an archive, until some are read.
TYPICAL_RATIO = 3.0


def progress_bar(*iterable: Any, **options: Any) -> tqdm:
    """A bar on a terminal, and a line now and then everywhere else.

    Args:
        iterable: what is gone through, if anything.
        options: of tqdm.
    """
    seconds = 0.1 if sys.stderr.isatty() else SECONDS_IN_LOGS
    return tqdm(*iterable, mininterval=seconds, maxinterval=max(10.0, seconds), **options)


class ReadingBar:
    """Progress of phase 1, in bytes of the files as stored.

    Args:
        pieces: name of the source and bytes of every piece that is still to be done.
        done_bytes: of the pieces that an earlier run finished. Default: 0.
    """

    def __init__(self, pieces: list[tuple[str, int]], done_bytes: int = 0) -> None:
        self.open = Counter(path for path, _ in pieces)
        self.files = self.left = len(self.open)
        self.counts: Counter[str] = Counter()
        self.reading = {
            True: 0,
            False: 0,
        }  # characters of unfinished pieces: of archives, of others
        self.finished_bytes = done_bytes
        self.archives = {"bytes": 1.0, "characters": TYPICAL_RATIO}  # of finished ones
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
        self.reading[news["source"].endswith(COMPRESSED)] += news["characters"]
        self._show()

    def finish_piece(self, report: Mapping[str, Any]) -> None:
        """Count a finished piece.

        Args:
            report: of the piece, with `source`, `bytes` as stored, and `characters`.
        """
        source = report["source"]
        self.open[source] -= 1
        self.left -= self.open[source] == 0
        self.finished_bytes += report["bytes"]
        self.reading[source.endswith(COMPRESSED)] -= report["characters"]
        if source.endswith(COMPRESSED):
            for name in self.archives:
                self.archives[name] += report[name]
        self._show()

    def _show(self) -> None:
        # A guess until a piece is done: an archive does not tell how far it has been read.
        ratio = self.archives["characters"] / self.archives["bytes"]
        reading = self.reading[True] / ratio + self.reading[False]
        position = min(self.finished_bytes + reading, self.bar.total)
        rate = self.counts["tokens"] / max(1e-9, time.monotonic() - self.started)
        self.bar.set_postfix_str(
            f"{self.files - self.left}/{self.files} files, {self.counts['documents']:,} documents, "
            f"{self.counts['tokens']:,} tokens, {rate:,.0f} tokens/s",
            refresh=False,
        )
        self.bar.update(max(0, position - self.bar.n))

    def close(self, whole: bool) -> None:
        """End the bar.

        Args:
            whole: whether all pieces are done.
        """
        if whole:
            self.bar.update(self.bar.total - self.bar.n)
        self.bar.close()
