"""`import fastkd` makes transformers know compressed models, and does not import transformers for it."""

import subprocess
import sys

import pytest


def run_python(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_fastkd_leaves_transformers_alone():
    assert run_python("import sys, fastkd; print('transformers' in sys.modules)") == "False"


REGISTERED = (
    "print('sparse_embedding' in auto.AUTO_QUANTIZER_MAPPING, "
    "sum(getattr(finder, 'registry', '') == 'transformers.quantizers.auto' for finder in sys.meta_path))"
)


@pytest.mark.parametrize(
    "imports",
    [
        "import fastkd; import transformers.quantizers.auto as auto",
        "import fastkd; from transformers import modeling_utils; import transformers.quantizers.auto as auto",
        "import transformers.quantizers.auto as auto; import fastkd",
        "import fastkd; import fastkd.embeddings.quantizer; import transformers.quantizers.auto as auto",
        "import fastkd; fastkd.embeddings.registration.register(); import transformers.quantizers.auto as auto",
    ],
    ids=["registry later", "models later", "registry before", "quantizer by hand", "asked for twice"],
)
def test_the_quantizer_is_registered_once_and_the_finder_is_gone(imports):
    assert run_python(f"import sys\n{imports}\n{REGISTERED}") == "True 0"


def test_looking_for_the_registry_without_importing_it_changes_nothing():
    program = (
        "import sys, fastkd, importlib.util\n"
        "importlib.util.find_spec('transformers.quantizers.auto')\n"
        "import transformers.quantizers.auto as auto\n"
        "print('sparse_embedding' in auto.AUTO_QUANTIZER_MAPPING)"
    )
    assert run_python(program) == "True"
