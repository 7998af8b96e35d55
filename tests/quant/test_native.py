"""The compiled unpacking of 4-bit weights against plain torch, its oracle."""

import os
import subprocess
import sys

import pytest
import torch

from qbl_trl.errors import ConfigError
from qbl_trl.quant import native
from qbl_trl.quant.affine import Affine, dequantize
from qbl_trl.quant.linear import GroupQuantLinear

needs_library = pytest.mark.skipif(native._library() is None, reason="no C compiler, or no x86 with AVX2")


@pytest.fixture
def fresh_library():
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def layer(rows, columns, size, kind, scale_dtype=torch.float16):
    groups = -(-columns // size)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    zeros = {
        "packed": torch.randint(0, 16, (rows, groups), dtype=torch.uint8),
        "float16": (torch.rand(rows, groups) * 15).half(),
        "none": torch.full((rows, groups), 8, dtype=torch.uint8),
    }[kind]
    affine = Affine(codes, torch.rand(rows, groups).to(scale_dtype), zeros)
    return GroupQuantLinear.from_affine(affine, bits=4, group_size=size, symmetric=kind == "none"), affine


@needs_library
@pytest.mark.parametrize("kind", ["packed", "float16", "none"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("columns", "size"), [(576, 32), (96, 32), (1536, 128), (1000, 32), (512, 256)])
def test_every_weight_has_the_bits_of_the_plain_path(columns, size, scale_dtype, kind, monkeypatch):
    found, affine = layer(192, columns, size, kind, scale_dtype)
    calls = []
    monkeypatch.setattr(native, "_dequantize", lambda *a, call=native._dequantize: calls.append(1) or call(*a))
    assert torch.equal(found.dequantize_rows(slice(None)), dequantize(*affine, size))
    assert torch.equal(found.dequantize_rows(slice(5, 188)), dequantize(*affine, size)[5:188])
    assert len(calls) == 2


@needs_library
@pytest.mark.parametrize("kind", ["packed", "float16", "none"])
@pytest.mark.parametrize(("columns", "size"), [(576, 32), (1536, 128), (1000, 32), (1000, 256)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 16])
def test_a_product_with_few_tokens_is_the_sum_of_the_same_weights(columns, size, kind, tokens, monkeypatch):
    found, affine = layer(192, columns, size, kind)
    x = torch.randn(2, tokens, columns)[1]  # a view that does not start at the first element
    out = torch.full((tokens, 192), torch.nan)
    assert found.multiply(x, out)
    weight, wide = dequantize(*affine, size).double(), x.double()
    rounded = (wide.abs() @ weight.abs().T) * (columns / 16 + 8) * 2**-24  # 16 sums side by side
    assert ((out - wide @ weight.T).abs() <= rounded).all()
    monkeypatch.setattr(native, "dequantize_rows", None)  # not needed
    assert torch.equal(found(x), out)


@needs_library
def test_a_product_is_not_taken_over_where_it_would_change_the_type_or_be_slower():
    found, _ = layer(192, 576, 32, "packed")
    for x in (torch.randn(17, 576), torch.randn(0, 576), torch.randn(2, 576).bfloat16(), torch.randn(2, 576).double()):
        out = torch.full((x.shape[0], 192), 7.0, dtype=x.dtype)
        assert not found.multiply(x, out)
        assert (out == 7).all()
        assert found(x).dtype == x.dtype


@pytest.mark.parametrize("shape", [(4, 1152), (8, 288), (577,)])
def test_an_input_of_another_width_is_refused(shape):
    found, _ = layer(192, 576, 32, "packed")
    with pytest.raises(ConfigError, match=r"of 576 inputs was handed"):
        found(torch.randn(shape))


@needs_library
@pytest.mark.parametrize(
    "out", [torch.zeros(2, 191), torch.zeros(3, 192), torch.zeros(192, 2).T, torch.zeros(2, 192).half()]
)
def test_a_product_goes_nowhere_but_where_it_fits(out):
    found, _ = layer(192, 576, 32, "packed")
    assert not found.multiply(torch.randn(2, 576), out)
    assert not found.multiply(torch.randn(2, 577), torch.zeros(2, 192))
    assert (out == 0).all()


@needs_library
def test_a_product_with_few_tokens_has_the_gradient_of_the_matrix_product():
    found, affine = layer(192, 576, 32, "packed")
    x = torch.randn(1, 3, 576, requires_grad=True)
    y = found(x)
    y += 1  # no view: layers that follow may add to it in place
    wanted = torch.randn(1, 3, 192)
    y.backward(wanted)
    weight = dequantize(*affine, 32).double()
    rounded = wanted.double().abs() @ weight.abs() * 192 * 2**-24
    assert ((x.grad - wanted.double() @ weight).abs() <= rounded).all()


@needs_library
def test_the_result_is_the_same_for_any_number_of_threads():
    found, affine = layer(384, 384, 32, "packed")
    threads = torch.get_num_threads()
    x, products = torch.randn(1, 384), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(found.dequantize_rows(slice(None)), dequantize(*affine, 32))
            products.append(found(x))
            assert torch.equal(products[0], products[-1])
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_dtypes_and_devices_of_the_moment_change_nothing(device, fresh_library):
    found, affine = layer(192, 576, 32, "packed")
    expected = dequantize(*affine, 32)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(device):  # as loaders set them, also while the library is checked
            assert native._library() is not None
            weight = found.dequantize_rows(slice(None))
    finally:
        torch.set_default_dtype(torch.float32)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("variables", [{"QBL_TRL_NATIVE": "0"}, {"CC": "no-such-compiler"}, {"CC": "false"}])
def test_without_the_library_plain_torch_does_it(variables, tmp_path, fresh_library, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found, affine = layer(192, 576, 32, "packed")
    assert torch.equal(found.dequantize_rows(slice(None)), dequantize(*affine, 32))
    assert native._library() is None
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_that_gives_other_bits_is_not_used(fresh_library, monkeypatch, caplog):
    monkeypatch.setattr(native, "_dequantize", lambda *a: torch.zeros(3, 192))
    assert native._library() is None


def test_a_library_that_multiplies_wrongly_is_not_used(fresh_library, monkeypatch):
    monkeypatch.setattr(native, "_multiply", lambda *a: a[-1].zero_())
    assert native._library() is None


@needs_library
def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, fresh_library, monkeypatch):
    (tmp_path / "qbl_trl").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native._library() is not None


@needs_library
def test_a_damaged_library_in_the_cache_is_no_obstacle(tmp_path, fresh_library, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = native._built()
    built.write_bytes(built.read_bytes()[:100])
    found, affine = layer(192, 576, 32, "packed")
    assert torch.equal(found.dequantize_rows(slice(None)), dequantize(*affine, 32))


@needs_library
def test_it_works_in_a_process_that_forked_after_using_it():
    code = (
        "import os, torch; from tests.quant.test_native import layer; f, _ = layer(192, 576, 32, 'packed');"
        "a = f.dequantize_rows(slice(None)); pid = os.fork();"
        "os._exit(0 if torch.equal(f.dequantize_rows(slice(0, 96)), a[:96]) else 1) if pid == 0 else None;"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], timeout=120, env={**os.environ, **environment})
    assert done.returncode == 0


@needs_library
@pytest.mark.parametrize("left", [0, 8192])
def test_a_library_that_was_cut_in_the_cache_is_built_again(left, tmp_path, fresh_library, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = native._built()
    whole = built.read_bytes()
    built.write_bytes(whole[:left])  # loading a part may end the process
    assert native._library() is not None
    (again,) = built.parent.glob("*.so")
    assert again.stem.partition("-")[2] == native._digest(again.read_bytes())
