import subprocess
import sys

import pytest

from ditty_di.postponed import postponed


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Return the name of a module that has not been imported."""
    (tmp_path / "big_library.py").write_text(
        "class Thing: pass\ndef double(x): return 2 * x\nOTHER = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "big_library"
    sys.modules.pop("big_library", None)


def test_a_module_is_imported_when_its_function_is_called(library):
    with postponed({library: ("double", "Thing")}):
        from big_library import Thing, double
    assert library not in sys.modules
    assert not isinstance(3, Thing) and double(3) == 6
    assert isinstance(sys.modules[library].Thing(), Thing)


def test_another_name_of_the_module_is_the_real_one(library):
    with postponed({library: ("double",)}):
        from big_library import OTHER
    assert OTHER == 3 and sys.modules[library].double(1) == 2


def test_a_module_that_is_there_already_stays(library):
    import big_library

    with postponed({library: ("double",)}):
        from big_library import double
    assert sys.modules[library] is big_library and double is big_library.double


def test_a_trainer_and_a_model_import_no_library_that_they_do_not_call():
    code = (
        "import sys, ditty_di.training.trainer; "
        "unwanted = {'transformers'} & set(sys.modules); "
        "import ditty_di.models.causal_lm; "
        "unwanted |= {'datasets', 'pandas', 'scipy.optimize', 'tensorboard', 'torchao'}; "
        "sys.exit(', '.join(unwanted & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
