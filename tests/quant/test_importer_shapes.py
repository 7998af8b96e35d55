"""Parts of a foreign layer that do not fit each other, and tensors that two files hold."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qbl_trl.errors import CheckpointError
from qbl_trl.quant.checkpoint import read_headers
from qbl_trl.quant.importers import describe_checkpoint, read_layers
from tests.quant import foreign
from tests.quant.foreign import COMPRESSED, GPTQ, HQQ, WEIGHTS, affines, write_layer
from tests.quant.test_mlx import SETTINGS, mlx_tensors
from tests.tiny import tiny_llama

LAYER = "model.layers.0.mlp.up_proj"
SYMMETRIC = {"targets": ["re:.*other"], "weights": WEIGHTS | {"symmetric": True}}


def damaged(folder, make, quantization, damage, affine_of):
    foreign.write_folder(folder, make, quantization, affine_of)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in damage(tensors).items()}, folder / "model.safetensors")
    return folder


def with_change(part, change):
    return lambda tensors: tensors | {f"{LAYER}.{part}": change(tensors[f"{LAYER}.{part}"])}


@pytest.mark.parametrize(
    ("make", "quantization", "affine_of", "damage", "message"),
    [
        (
            partial(foreign.hqq_tensors, bits=4),
            HQQ,
            affines(zeros="float"),
            ("W_q", lambda w: torch.cat([w, w])),
            "W_q",
        ),
        (partial(foreign.hqq_tensors, bits=4), HQQ, affines(zeros="float"), ("W_q", lambda w: w.T.contiguous()), "W_q"),
        (partial(foreign.hqq_tensors, bits=4), HQQ, affines(zeros="float"), ("scale", lambda s: s[:1]), "damaged"),
        (
            partial(foreign.hqq_tensors, bits=4),
            HQQ,
            affines(zeros="float"),
            ("axis", lambda a: a.repeat(2)),
            "axis is no",
        ),
        (partial(foreign.gptq_tensors, bits=4), GPTQ, affines(), ("qweight", lambda w: w[:0]), "damaged|shapes"),
    ],
    ids=["rows", "turned", "scales", "axis", "empty"],
)
def test_a_layer_whose_parts_do_not_fit_each_other_is_refused(tmp_path, make, quantization, affine_of, damage, message):
    folder = damaged(tmp_path / "in", make, quantization, with_change(*damage), affine_of)
    with pytest.raises(CheckpointError, match=message):
        list(read_layers(folder))


@pytest.mark.parametrize("shape", [(slice(None), slice(1)), (slice(1), slice(1))])
def test_offsets_of_mlx_are_as_many_as_its_scales(tmp_path, shape):
    foreign.write_folder(tmp_path / "in", mlx_tensors, {}, affines())
    file, settings = tmp_path / "in" / "model.safetensors", tmp_path / "in" / "config.json"
    config = json.loads(settings.read_text())
    del config["quantization_config"]
    settings.write_text(json.dumps(config | {"quantization": SETTINGS}))
    tensors = load_file(file)
    save_file(tensors | {f"{LAYER}.biases": tensors[f"{LAYER}.biases"][shape].contiguous()}, file)
    with pytest.raises(CheckpointError, match="is no mlx layer by its shapes"):
        list(read_layers(tmp_path / "in"))


def test_a_symmetric_group_beside_it_excuses_no_layer_from_its_zero_points(tmp_path):
    make = partial(foreign.compressed_tensors, bits=4, symmetric=False)
    groups = COMPRESSED["config_groups"]
    settings = COMPRESSED | {"config_groups": groups | {"other": SYMMETRIC}}
    folder = damaged(
        tmp_path / "in", make, settings, lambda t: {k: v for k, v in t.items() if k != f"{LAYER}.weight_zero_point"},
        affines(),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=f"symmetric=false, but {LAYER} has no weight_zero_point"):
        describe_checkpoint(folder)


@pytest.mark.parametrize("group", [[1], {"weights": [1]}, {"targets": [5]}])
def test_groups_of_layers_that_are_none_are_said_to_be_damaged(tmp_path, group):
    settings = COMPRESSED | {"config_groups": {"group_0": group}}
    foreign.write_folder(
        tmp_path / "in", partial(foreign.compressed_tensors, bits=4, symmetric=False), settings, affines()
    )
    with pytest.raises(CheckpointError, match="names no config_groups; the file is damaged"):
        describe_checkpoint(tmp_path / "in")


@pytest.mark.parametrize(("columns", "stored"), [(896, 128), (576, 64), (1024, 128), (200, 128)])
def test_the_scale_of_a_whole_row_is_repeated_for_groups_that_fill_it(tmp_path, columns, stored):
    write_layer(tmp_path / "in", columns, columns, GPTQ | {"group_size": -1})
    assert describe_checkpoint(tmp_path / "in")["group_size"] == stored


def test_of_a_tensor_in_two_files_the_last_counts_as_it_does_in_transformers(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    file = tmp_path / "model.safetensors.index.json"
    index, norm = json.loads(file.read_text())["weight_map"], "model.norm.weight"
    first, *_, last = sorted(set(index.values()))
    for shard in (first, last):
        tensors = load_file(tmp_path / shard)
        save_file(tensors | {norm: torch.full_like(model.model.norm.weight, 1 + (shard == last))}, tmp_path / shard)
    for named in (first, last):
        file.write_text(json.dumps({"metadata": {}, "weight_map": index | {norm: named}}))
        assert read_headers(tmp_path)[norm].file.name == last
        assert float(AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight[0]) == 2
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"both hold {norm}, and no index says which of them counts"):
        read_headers(tmp_path)
