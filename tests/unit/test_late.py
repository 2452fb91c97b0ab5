"""Stand-ins for modules: nothing is loaded for what they know, all is there that is asked for."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

TEXTS = ["a line", "  a line ", "", "two\n  lines\n\n    and\tmore \n", "\ta", "\n"]


def told(code: str) -> object:
    """Run code in an interpreter of its own, with the stand-ins; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys, ublk_ubi.late\n{code}"],
        capture_output=True, text=True, check=True,
    )
    return json.loads(done.stdout)


def test_what_they_know_loads_nothing() -> None:
    code = """
import inspect, platform, textwrap
said = [inspect.cleandoc(" one line"), platform.system()]
print(json.dumps([said, [name in sys.modules for name in ("ast", "dis", "importlib")]]))
"""
    assert told(code) == [["one line", "Linux"], [False, False, False]]


@pytest.mark.parametrize("look", [
    "import inspect; inspect.signature(print)",
    "from inspect import signature",
    "import inspect; inspect.cleandoc('a\\\\n b')",
])
def test_the_first_look_at_more_loads_them(look: str) -> None:
    code = f"""
{look}
import inspect as now
print(json.dumps(["ast" in sys.modules, now.__file__ is not None, now is sys.modules["inspect"]]))
"""
    assert told(code.replace("\\\\n", "\\n")) == [True, True, True]


def test_who_holds_a_stand_in_has_the_module() -> None:
    code = """
import platform, textwrap
machine, folded = platform.machine(), textwrap.dedent("  a")
before, after = textwrap, __import__("textwrap")
print(json.dumps([bool(machine), folded, before is after, before.wrap is after.wrap]))
"""
    assert told(code) == [True, "a", False, True]


def test_what_a_module_has_not_is_told_as_by_itself() -> None:
    code = """
import textwrap
try:
    textwrap.nothing
except AttributeError as error:
    print(json.dumps(str(error)))
"""
    assert told(code) == "module 'textwrap' has no attribute 'nothing'"


def test_a_module_that_is_there_stays() -> None:
    code = "import inspect, ublk_ubi.late, sys; assert sys.modules['inspect'] is inspect"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cleaned_text_is_the_same() -> None:
    found = told(f"import inspect\nprint(json.dumps([inspect.cleandoc(t) for t in {TEXTS!r}]))")
    assert found == [inspect.cleandoc(text) for text in TEXTS]
