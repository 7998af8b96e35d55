"""What comparisons are made in, while a run allows itself coarser products."""

import threading

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from qbl_trl import GroupQuantConfig, QBLoRAConfig, arithmetic, merge
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.arithmetic import plain_arithmetic, plain_defaults
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.trl.probe import probe
from tests.tiny import tiny_llama

new_setting = pytest.mark.skipif(not arithmetic._BACKENDS, reason="torch before 2.9 has one setting for all")


class TensorCores(TorchDispatchMode):
    """Float32 products as TF32 has them (inputs of 10 bits of mantissa), where the setting allows it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
        if allowed and function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            args = [rounded(tensor) for tensor in args]
        elif allowed and function is torch.ops.aten.addmm.default:
            args = [args[0], *(rounded(tensor) for tensor in args[1:])]
        return function(*args, **(kwargs or {}))


def rounded(tensor):
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with TensorCores():
        yield
    torch.set_float32_matmul_precision(before)


def adapted():
    model = tiny_llama(hidden_size=256, intermediate_size=512)
    quantize_model_(model, GroupQuantConfig())
    return get_peft_model(model, QBLoRAConfig(r=8, quantization_aware=True, init_lora_weights=False))


@new_setting
def test_the_merge_and_the_rehearsal_are_exact_in_a_run_with_tf32(tf32):
    x = torch.randn(16, 64)
    exact = x.double() @ x.T.double()
    assert float((x @ x.T - exact).abs().max()) > 1e-3  # as in the run
    model = adapted()
    assert max(probe(adapter_layers(model)).values()) <= 1e-5
    merge(model)
    assert float((x @ x.T - exact).abs().max()) > 1e-3


@new_setting
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_setting_of_the_run_comes_back_after_an_error_too(precision):
    before, backends = torch.get_float32_matmul_precision(), (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    seen = []

    def fail():
        with plain_arithmetic("cpu"):
            seen.extend(backend.fp32_precision for backend in backends)
            raise KeyError

    torch.set_float32_matmul_precision(precision)
    try:
        of_the_run = [backend.fp32_precision for backend in backends]
        with pytest.raises(KeyError):
            fail()
        assert seen == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == of_the_run
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@new_setting
def test_what_a_run_set_for_all_stays_what_the_others_follow():
    before, matmul = torch.backends.fp32_precision, torch.backends.cuda.matmul
    own = matmul.fp32_precision
    torch.backends.fp32_precision, matmul.fp32_precision = "tf32", "none"
    try:
        assert matmul.fp32_precision == "tf32"
        with plain_arithmetic("cpu"):
            assert matmul.fp32_precision != "tf32"
        assert torch.backends.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision != "tf32"  # still follows
    finally:
        torch.backends.fp32_precision, matmul.fp32_precision = before, own


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_one_setting_of_an_older_torch(monkeypatch, precision):
    monkeypatch.setattr(arithmetic, "_BACKENDS", ())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with plain_arithmetic("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_is_off_inside():
    a = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with plain_arithmetic("cpu"):
            assert (a @ a).dtype == torch.float32


def test_defaults_of_the_process_come_back_when_the_last_of_several_threads_is_done():
    first, second = threading.Event(), threading.Event()

    def work():
        with plain_defaults():
            first.set()
            assert second.wait(10)
            seen.append(torch.get_default_dtype())

    seen = []
    torch.set_default_dtype(torch.bfloat16)
    try:
        with plain_defaults():
            thread = threading.Thread(target=work)
            thread.start()
            assert first.wait(10)
        second.set()
        thread.join()
        assert seen == [torch.float32]
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
