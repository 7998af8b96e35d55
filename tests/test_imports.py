"""The package's imports point one way, and only its edges know the big libraries."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qbl_trl.errors import EXPORT_PACKAGES

PACKAGE = Path(__file__).resolve().parents[1] / "qbl_trl"

# Lower layers first; a module may import its own layer's folder and every layer below it. Modules of one row are
# siblings that never import each other, but for the adapter, which may look at the base it sits on.
ROWS = [
    {"generation"},
    {"allowed", "arguments", "errors", "leftovers", "peft_type", "progress", "random_state"},
    {"cards", "json_files"},
    {"older_names", "module_names", "tokenizers"},
    {"arithmetic", "folders", "model_files", "texts"},
    {"config", "wrapped"},
    {"loading"},
    {"parity"},
    {"quant", "adapter"},
    {"merging"},
    {"trl", "onnx"},
    {"verifying"},
    {"commands"},
    {"cli"},
]
ALLOWED_SIBLINGS = {("adapter", "quant")}
# Looks upwards by name, at the moment they are needed: a graph is exported at the end of a training run.
LATE = {
    ("trl", "qbl_trl.onnx.asked"),
    ("trl", "qbl_trl.onnx.companions"),
    ("trl", "qbl_trl.onnx.trace"),
}
ONLY_IN = {
    "trl": {"trl"},
    "optimum": {"onnx"},
    "onnx": {"onnx"},
    "onnxruntime": {"onnx"},
    "onnx_ir": {"onnx"},
    "peft": {"peft_type", "config", "wrapped", "adapter", "merging", "trl", "onnx", "loading"},
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
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (one.value for one in node.args if isinstance(one, ast.Constant))


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
            below = other == own or row[other] < row[own] or (own, other) in ALLOWED_SIBLINGS
            assert below or (own, name) in LATE, f"{module} -> {name}"
        root = name.split(".")[0]
        assert root not in ONLY_IN or own in ONLY_IN[root], f"{module} imports {root}"


def test_importing_the_package_loads_neither_the_trainer_nor_the_exporter():
    code = (
        "import sys, qbl_trl\n"
        "heavy = {'trl', 'optimum', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "status", "answer"),
    [
        (["--help"], 0, "COMMAND"),
        (["--version"], 0, "qbl-trl 0."),
        (["quantize", "--help"], 0, "--algorithm"),
        (["export", "--help"], 0, "--accuracy-level"),
        (["merge", "ADAPTER"], 2, "required: output"),
        (["export", "MODEL", "OUT", "--provider", "tpu"], 2, "invalid choice: 'tpu'"),
        (["quantize", "--from", "MODEL", "OUT", "--bits", "8"], 1, "leave out --bits"),
    ],
)
@pytest.mark.parametrize("launched", ["module", "script"])
def test_help_and_wrong_arguments_are_answered_before_anything_large_is_loaded(
    arguments, status, answer, launched, tmp_path
):
    script = tmp_path / "qbl-trl"  # what pip writes
    script.write_text("import sys\nfrom qbl_trl.cli import main\nsys.exit(main())\n")
    how = ["-m", "qbl_trl.cli"] if launched == "module" else [str(script)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-X", "importtime", *how, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    timed = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in timed}
    assert run.returncode == status, run.stderr
    assert answer in run.stdout + run.stderr
    assert "qbl_trl" in loaded
    assert not loaded & {"torch", "transformers", "peft", "numpy", "onnx", "onnxruntime"}


def test_a_command_knows_the_adapter_and_the_quantizer_when_it_runs(tmp_path):
    code = (
        "import sys\n"
        "sys.argv = ['qbl-trl']\n"
        "from qbl_trl.cli import main\n"
        "assert 'torch' not in sys.modules\n"
        "assert main(['inspect', './nowhere']) == 1\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'QBLORA' in PEFT_TYPE_TO_CONFIG_MAPPING\n"
        "assert 'group_quant' in AUTO_QUANTIZER_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_onnx_packages_every_name_imports_and_export_says_what_to_install():
    code = (
        "import sys, transformers\n"
        "sys.modules['onnxruntime'] = sys.modules['onnx'] = sys.modules['onnx_ir'] = sys.modules['optimum'] = None\n"
        "from qbl_trl import *\n"
        "from qbl_trl import export_onnx\n"
        "try:\n"
        "    export_onnx('model', 'out')\n"
        "except ImportError as error:\n"
        "    extra = 'onnx' if transformers.__version__ < '5' else 'onnx5'\n"
        "    assert f'pip install \"qbl-trl[{extra}]\"' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('it ran')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_extras_bring_is_what_a_missing_package_is_explained_by():
    extras = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {re.match(r"[\w-]+", entry).group().replace("-", "_") for entry in extras["onnx"] + extras["onnx5"]}
    assert brought - {"transformers", "optimum_onnx", "onnxruntime_genai"} == EXPORT_PACKAGES
