"""The names of the package, resolved when they are used: in fresh processes."""

import subprocess
import sys

import pytest

import msmoe


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_no_library():
    code = "import sys; before = set(sys.modules); import msmoe; print(*set(sys.modules) - before)"
    found = {name.partition(".")[0] for name in run_python(code).split()}
    assert found - set(sys.stdlib_module_names) == {"msmoe"}


def test_dir_and_star_give_every_public_name():
    assert set(msmoe.__all__) <= set(dir(msmoe))
    code = "import msmoe; from msmoe import *; print(all(globals()[n] is getattr(msmoe, n) for n in msmoe.__all__))"
    assert run_python(code) == "True\n"


def test_no_public_name_is_also_a_module():
    code = "import pkgutil, msmoe; print(*{m.name for m in pkgutil.iter_modules(msmoe.__path__)} & set(msmoe.__all__))"
    assert run_python(code) == "\n"


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = msmoe.quantise
