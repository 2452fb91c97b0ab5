"""Unit tests run natively. `enginekit` is what those of the engines share."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest

# Found the same way whatever pytest's import mode is.
sys.path.insert(0, str(Path(__file__).resolve().parent))
pytest.register_assert_rewrite("enginekit")

# A shell's background job ignores Ctrl-C, nohup's hangups, and what they start does so, too: tests
# send both. What a handler takes here is the default again where another program is run.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)

# In CI the same examples every time, and a failure that anybody can repeat.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("here", deadline=None, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")
