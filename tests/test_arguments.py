"""Messages of functions in the words of a command line."""

from pathlib import Path

import pytest

from qbl_trl.arguments import in_flags, named, path
from qbl_trl.cli import _parser

CASES = [
    (
        "export",
        'calibration is for kv_cache_dtype="int8" and embedding_bits',
        "calibration is for --kv-cache-dtype int8 and --embedding-bits",
    ),
    ("export", "/tmp/dtype=8/logits=last/x is not empty", None),
    ("export", "m/bits=4,dtype=float16/model: no such folder", None),
    (
        "export",
        "Use GroupQuantConfig(f(x), bits=4, dtype=8) or dtype=float16.",
        "Use GroupQuantConfig(f(x), bits=4, dtype=8) or --dtype float16.",
    ),
    ("export", "pass max_length=4096, or tolerance=None", "pass --max-length 4096, or --tolerance none"),
    ("export", "model='a.b', calibration=None", None),
    (
        "export",
        "prompt_accuracy_level=0; see qbl_trl/onnx/asked.py",
        "--prompt-accuracy-level 0; see qbl_trl/onnx/asked.py",
    ),
    ("export", "tokenizer='no/where' is no folder", "--tokenizer no/where is no folder"),
    ("export", "the dtype and the tokenizer of this model", None),
    ("quantize", "/c: symmetric=false, but model.q has no weight_zero_point", None),
    ("quantize", 'set symmetric=False, or algorithm="mse"', "leave out --symmetric, or --algorithm mse"),
    ("convert", 'format="gguf" needs template=, a GGUF file', "--to gguf needs --template, a GGUF file"),
]


@pytest.mark.parametrize(("command", "message", "expected"), CASES)
def test_settings_become_flags_and_nothing_else_does(command, message, expected):
    parser = _parser(command)
    given = {
        "export": ["m/bits=4,dtype=float16/model", "O"],
        "quantize": ["M", "O"],
        "convert": ["M", "O", "--to", "gguf"],
    }
    args = parser.parse_args(given[command])
    assert in_flags(message, parser, args, {"format": "to"}) == (expected or message)


def test_a_home_is_found_where_no_shell_has_put_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert path("~/out") == Path("/home/me/out")
    assert (named("~/model"), named("org/model")) == ("/home/me/model", "org/model")
