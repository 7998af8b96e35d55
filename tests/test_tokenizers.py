"""The tokenizer beside a model, whichever generation of transformers wrote it."""

import json

import pytest
from transformers import AutoTokenizer

from qbl_trl.tokenizers import open_tokenizer, save_tokenizer
from tests.trl import data

TEXT = "t3 t7 t1"


def written_by(generation, folder):
    """A tokenizer's folder as transformers 4.57 or 5 writes it."""
    folder.mkdir()
    data.tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    names = {4: "PreTrainedTokenizerFast", 5: "TokenizersBackend"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": names[generation]}))
    return folder


@pytest.mark.parametrize("generation", [4, 5])
def test_a_tokenizer_of_either_generation_is_opened_and_copied_for_both(tmp_path, generation):
    source, expected = written_by(generation, tmp_path / "source"), data.tokenizer()(TEXT).input_ids
    assert open_tokenizer(source)(TEXT).input_ids == expected
    for given in (source, open_tokenizer(source)):
        copy = tmp_path / type(given).__name__
        copy.mkdir()
        save_tokenizer(given, copy)
        assert json.loads((copy / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert AutoTokenizer.from_pretrained(copy)(TEXT).input_ids == expected


def test_special_tokens_in_the_words_of_transformers_5_are_kept(tmp_path):
    source = written_by(5, tmp_path / "source")
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "extra_special_tokens": ["<user>", "<assistant>"]}))
    (tmp_path / "copy").mkdir()
    save_tokenizer(source, tmp_path / "copy")
    for tokenizer in (open_tokenizer(source), open_tokenizer(tmp_path / "copy")):
        assert {"<user>", "<assistant>"} <= set(tokenizer.all_special_tokens)
    assert {"<user>", "<assistant>"} <= set(AutoTokenizer.from_pretrained(tmp_path / "copy").all_special_tokens)


def test_a_folder_without_a_tokenizer_gives_none(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "copy").mkdir()
    save_tokenizer(tmp_path / "source", tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())
