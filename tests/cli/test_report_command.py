"""`fastkd report` keeps what it has measured when a build's time is over."""

import os
import signal
import time
from argparse import Namespace

import pytest

from fastkd import edge
from fastkd.cli import report


def test_sigterm_ends_a_report_as_ctrl_c_does(monkeypatch):
    def measured(**_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(edge, "report", measured)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            report.run(Namespace())
    finally:
        signal.signal(signal.SIGTERM, before)
