"""What `import fastkd` loads, and that the folder `kernels/` at the root disturbs nobody."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(code, **options):
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_fastkd_imports_neither_transformers_nor_triton(tmp_path):
    loaded = run("import sys, fastkd; print(*sys.modules)", cwd=tmp_path).split()
    heavy = {"transformers", "triton", "datasets", "accelerate", "sklearn", "scipy", "matplotlib", "pandas", "rich"}
    assert "torch" in loaded and not heavy & set(loaded)


def test_fastkd_imports_in_a_fifth_of_a_second_after_torch(tmp_path):
    # Processor time, the best of three: what else the machine does does not count.
    code = "import torch, time; start = time.process_time(); import fastkd; print(time.process_time() - start)"
    assert min(float(run(code, cwd=tmp_path)) for _ in range(3)) < 0.2


def test_info_needs_no_heavy_import(tmp_path):
    code = "import sys, fastkd.info; fastkd.info.report(); print(*sys.modules)"
    assert not {"transformers", "triton", "datasets"} & set(run(code, cwd=tmp_path).split())


def test_a_kernels_folder_at_the_root_does_not_disturb_transformers():
    # transformers takes any importable `kernels` for the hub's package of that name, unless it lacks its metadata.
    code = "from transformers.utils import is_kernels_available; import kernels; print(is_kernels_available())"
    assert run(code, cwd=ROOT).strip() == "False"
    run("import transformers; from transformers import BertConfig, BertModel; import kernels", cwd=ROOT)
