"""Where each test runs: below tests/device and tests/e2e in the lab's guest, elsewhere here."""

from __future__ import annotations

pytest_plugins = ["labplugin.plugin"]
