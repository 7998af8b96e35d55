"""The tokenizer or processor beside a model, whichever generation of transformers wrote it."""

import json

import pytest
from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperFeatureExtractor

from qbl_trl import tokenizers
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


def test_tokens_that_a_model_names_keep_their_names(tmp_path):
    source = written_by(5, tmp_path / "source")
    file = source / "tokenizer_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "extra_special_tokens": [], "image_token": "<user>"}))
    (tmp_path / "copy").mkdir()
    save_tokenizer(source, tmp_path / "copy")
    for tokenizer in (open_tokenizer(source), AutoTokenizer.from_pretrained(tmp_path / "copy")):
        assert tokenizer.image_token == "<user>"
        assert tokenizer.image_token_id == tokenizer.convert_tokens_to_ids("<user>")


def test_every_template_and_vocabulary_is_copied(tmp_path):
    source, copy = written_by(4, tmp_path / "source"), tmp_path / "copy"
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "D", "rag": "R"}
    tokenizer.save_pretrained(source)
    files = ("sentencepiece.bpe.model", "source.spm", "qwen.tiktoken", "entity_vocab.json", "README.txt", "own.py")
    for name in files:
        (source / name).write_text("{}")
    copy.mkdir()
    save_tokenizer(source, copy)
    assert AutoTokenizer.from_pretrained(copy).chat_template == {"default": "D", "rag": "R"}
    assert {name for name in files if (copy / name).is_file()} == set(files[:4])
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    save_tokenizer(source, copy)
    assert (copy / "own.py").is_file()


HEARING = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
SEEING = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}}
WATCHING = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 14}
SHARED = {"processor_class": "Gemma3Processor", "image_seq_length": 4}


def with_processor(generation, source, **parts):
    """The folder of a tokenizer, with a processor beside it as transformers 4.57 or 5 writes one."""
    written_by(generation, source)
    files = {"processor_config.json": {**SHARED, **parts}}
    if generation == 4:
        seen, moving = parts.get("image_processor") or parts["feature_extractor"], parts.get("video_processor")
        files = {"processor_config.json": SHARED, "preprocessor_config.json": seen}
        files |= {"video_preprocessor_config.json": moving} if moving else {}
    for name, settings in files.items():
        (source / name).write_text(json.dumps(settings))
    return source


@pytest.mark.parametrize("generation", [4, 5])
def test_a_processor_is_copied_so_that_both_generations_read_it(tmp_path, generation):
    source = with_processor(generation, tmp_path / "source", image_processor=SEEING, video_processor=WATCHING)
    copy = tmp_path / "copy"
    copy.mkdir()
    save_tokenizer(source, copy)
    wanted = {
        "processor_config.json": SHARED,
        "preprocessor_config.json": SEEING,
        "video_preprocessor_config.json": WATCHING,
    }
    for name, settings in wanted.items():
        assert settings.items() <= json.loads((copy / name).read_text()).items()
    assert json.loads((copy / "processor_config.json").read_text()) == SHARED
    assert AutoTokenizer.from_pretrained(copy)(TEXT).input_ids == data.tokenizer()(TEXT).input_ids


@pytest.mark.parametrize("generation", [4, 5])
def test_what_hears_opens_from_the_copy(tmp_path, generation):
    source = with_processor(generation, tmp_path / "source", feature_extractor=HEARING.to_dict())
    (tmp_path / "copy").mkdir()
    save_tokenizer(source, tmp_path / "copy")
    found = AutoFeatureExtractor.from_pretrained(tmp_path / "copy").to_dict()
    found.pop("processor_class", None)
    assert found == {key: value for key, value in HEARING.to_dict().items() if key != "processor_class"}


def test_the_processor_of_a_model_id_is_written_with_its_tokenizer(tmp_path, monkeypatch):
    source = with_processor(4, tmp_path / "source", image_processor=SEEING)

    def cached(name, file, **options):
        assert (name, options) == ("me/tiny", {"_raise_exceptions_for_missing_entries": False})
        return str(source / file) if (source / file).is_file() else None

    monkeypatch.setattr(tokenizers, "cached_file", cached)
    monkeypatch.setattr(tokenizers, "open_tokenizer", lambda name: AutoTokenizer.from_pretrained(source))
    (tmp_path / "copy").mkdir()
    save_tokenizer("me/tiny", tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "preprocessor_config.json").read_text()) == SEEING
    assert not (tmp_path / "copy" / "video_preprocessor_config.json").exists()


def test_a_folder_without_a_tokenizer_gives_none(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "copy").mkdir()
    save_tokenizer(tmp_path / "source", tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())
