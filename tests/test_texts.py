"""Texts of a file, as the tokenizer of a folder reads them."""

import json

import pytest
import torch

from qbl_trl.errors import ConfigError
from qbl_trl.texts import read_texts, token_ids
from tests.trl import data


@pytest.fixture
def folder(tmp_path):
    data.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def written(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path / name


def test_blank_lines_separate_plain_texts(tmp_path):
    file = written(tmp_path, "a.txt", "\n\none\ntwo\n \n\n  three\n")
    assert read_texts(file) == ["one\ntwo", "  three"]


def test_a_line_of_jsonl_is_a_text_as_datasets_hold_them(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        "one\ntwo",
        {"text": "three\u2028", "label": 1},
        {"prompt": "four ", "completion": "five"},
        {"prompt": "a", "prompt_id": "7", "messages": turns},
        {"prompt": turns[:1], "completion": turns[1:]},
    ]
    file = written(tmp_path, "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert read_texts(file) == ["one\ntwo", "three\u2028", "four five", turns, turns]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n\n ", "a.txt holds no text"),
        ("a.jsonl", "\n", "a.jsonl holds no text"),
        ("a.jsonl", '"one"\n{', "a.jsonl, line 2: Expecting property name"),
        ("a.jsonl", '"one"\n\n{"tokens": [1]}', "a.jsonl, line 3: no text; a line is"),
        ("a.jsonl", "[1]", "a.jsonl, line 1: no text; a line is"),
        ("a.jsonl", '{"prompt": "Q", "completion": [{"role": "assistant", "content": "A"}]}', "line 1: no text"),
        ("a.jsonl", '{"prompt": [{"role": "user", "content": "Q"}], "completion": "A"}', "line 1: no text"),
    ],
)
def test_a_file_without_texts_is_refused_by_its_line(tmp_path, name, content, message):
    with pytest.raises(ConfigError, match=message):
        read_texts(written(tmp_path, name, content))


def test_what_is_no_file_or_no_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.txt: no such file"):
        read_texts(tmp_path / "nowhere.txt")
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="is no text in UTF-8"):
        read_texts(tmp_path / "model.bin")


def test_texts_become_the_ids_that_the_tokenizer_gives(folder):
    tokenizer = data.tokenizer()
    text = data.texts(1)[0]["text"]
    (ids,) = token_ids(folder, [text])
    assert torch.equal(ids, tokenizer(text, return_tensors="pt").input_ids)


def test_chats_are_written_by_the_template_of_the_tokenizer(folder):
    messages = data.chats(1)[0]["messages"]
    tokenizer = data.tokenizer()
    (ids,) = token_ids(folder, [messages])
    expected = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
    assert ids[0].tolist() == expected.input_ids
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="has no chat template for messages"):
        token_ids(folder, [messages])


def test_a_folder_without_a_tokenizer_and_a_text_without_a_token_are_refused(folder, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(ConfigError, match="bare holds no tokenizer"):
        token_ids(tmp_path / "bare", ["a"])
    with pytest.raises(ConfigError, match="a text holds no token: ''"):
        token_ids(folder, [""])


@pytest.mark.parametrize(("name", "line"), [("texts.jsonl", '"one"'), ("texts.txt", "one")])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, name, line):
    (tmp_path / name).write_text(line, encoding="utf-8-sig")
    assert read_texts(tmp_path / name) == ["one"]
