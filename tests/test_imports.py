"""The package's imports point one way, and only its edges know the big libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "qbl_trl"

# Lower layers first; a module may import its own layer's folder and every layer below it. Modules of one row are
# siblings that never import each other, but for the adapter, which may look at the base it sits on.
ROWS = [
    {"generation"},
    {"errors", "peft_type", "progress", "random_state", "older_names", "tokenizers"},
    {"folders"},
    {"config"},
    {"loading"},
    {"parity"},
    {"quant", "adapter"},
    {"merging"},
    {"trl", "onnx"},
    {"cli"},
]
ALLOWED_SIBLINGS = {("adapter", "quant")}
ONLY_IN = {
    "trl": {"trl"},
    "optimum": {"onnx"},
    "onnx": {"onnx"},
    "onnxruntime": {"onnx"},
    "onnx_ir": {"onnx"},
    "peft": {"peft_type", "config", "adapter", "merging", "trl", "onnx", "loading"},
}


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        yield file, ".".join(parts)


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module


@pytest.mark.parametrize(
    ("file", "module"), [pytest.param(f, m, id=m) for f, m in modules() if m != "qbl_trl.__init__"]
)
def test_imports_point_one_way(file, module):
    row = {name: at for at, names in enumerate(ROWS) for name in names}
    own = layer_of(module)
    assert own in row, f"{module} belongs to no layer"
    for name in imports(file):
        if name.startswith("qbl_trl."):
            other = layer_of(name)
            assert other == own or row[other] < row[own] or (own, other) in ALLOWED_SIBLINGS, f"{module} -> {name}"
        root = name.split(".")[0]
        assert root not in ONLY_IN or own in ONLY_IN[root], f"{module} imports {root}"


def test_importing_the_package_loads_neither_the_trainer_nor_the_exporter():
    code = (
        "import sys, qbl_trl\n"
        "heavy = {'trl', 'optimum', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_onnx_packages_every_name_imports_and_export_says_what_to_install():
    code = (
        "import sys\n"
        "sys.modules['onnxruntime'] = sys.modules['onnx'] = sys.modules['onnx_ir'] = sys.modules['optimum'] = None\n"
        "from qbl_trl import *\n"
        "from qbl_trl import export_onnx\n"
        "try:\n"
        "    export_onnx('model', 'out')\n"
        "except ImportError as error:\n"
        "    assert 'pip install \"qbl-trl[onnx]\"' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('it ran')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
