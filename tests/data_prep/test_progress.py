import io
import sys
import time

import pytest

from apex_composer.data_prep.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "least", "most"), [(io.StringIO(), 1, 3), (Terminal(), 5, 100)])
def test_a_bar_moves_on_a_terminal_only(monkeypatch, stream, least, most):
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress_bar(range(200)):
        time.sleep(0.005)
    assert least <= stream.getvalue().count("\r") <= most
    assert "200/200" in stream.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    bar = progress_bar(total=600)
    bar.last_print_t = bar.start_t = 0
    for second in range(600):
        bar._time = lambda second=second: second
        bar.update()
    bar.close()
    assert 15 <= log.getvalue().count("\r") <= 25
