import io
import sys
import time

import pytest

from apex_composer.data_prep.progress import ReadingBar, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "least", "most"), [(io.StringIO(), 1, 3), (Terminal(), 3, 50)])
def test_a_bar_moves_on_a_terminal_only(monkeypatch, stream, least, most):
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress_bar(range(100)):
        time.sleep(0.005)
    assert least <= stream.getvalue().count("\r") <= most
    assert "100/100" in stream.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    bar = progress_bar(total=600)
    bar.last_print_t = bar.start_t = 0
    for second in range(600):
        bar._time = lambda second=second: second
        bar.update()
    bar.close()
    assert 15 <= log.getvalue().count("\r") <= 25


def test_the_bar_of_phase_1_moves_with_every_news_and_ends_with_the_bytes():
    # Of one plain file in two pieces and an archive; a third of all was done by an earlier run.
    bar = ReadingBar([("a.jsonl", 100), ("a.jsonl", 100), ("b.gz", 100)], done_bytes=150)
    assert (bar.bar.n, bar.bar.total) == (150, 450)
    news = {"documents": 1, "tokens": 20}
    bar.advance(news | {"source": "a.jsonl", "characters": 50})
    assert bar.bar.n == 200
    bar.advance(news | {"source": "b.gz", "characters": 90})  # 3 characters a byte, as a guess
    assert bar.bar.n == 230
    bar.finish_piece("a.jsonl", stored=100, characters=50)
    assert bar.bar.n == 280 and "0/2 files, 2 documents, 40 tokens" in bar.bar.postfix
    bar.finish_piece("b.gz", stored=100, characters=90)
    assert bar.bar.n == 350 and "1/2 files" in bar.bar.postfix
    bar.advance(news | {"source": "a.jsonl", "characters": 900})
    assert bar.bar.n == 450  # never beyond the end
    bar.close(whole=True)


def test_files_of_unknown_size_do_no_harm():
    bar = ReadingBar([("s3://bucket/b.gz", 0)])
    bar.advance({"documents": 1, "tokens": 2, "characters": 5, "source": "s3://bucket/b.gz"})
    bar.finish_piece("s3://bucket/b.gz", stored=0, characters=5)
    assert bar.bar.n == 0 and "1/1 files" in bar.bar.postfix
    bar.close(whole=True)
