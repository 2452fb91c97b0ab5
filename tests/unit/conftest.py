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

# A background job of a shell ignores Ctrl-C, and what it starts inherits that; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# In CI the same examples every time, and a failure that anybody can repeat.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("here", deadline=None, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")
