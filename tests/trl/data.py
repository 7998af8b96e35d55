"""A tokenizer made in code and a few small datasets: every trainer can run without a download."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_TEXT = "the a red green blue dog cat bird fish runs sleeps eats sees and not who what why yes no it is was"
WORDS = _TEXT.split()
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, a chat template with generation marks, 32 tokens."""
    special = ["<unk>", "<pad>", "<s>", "</s>", "<user>", "<assistant>"]
    vocabulary = {token: index for index, token in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
        model_max_length=64,
    )


def _sentence(i: int, length: int = 6) -> str:
    return " ".join(WORDS[(i * 7 + j * (3 + i % 5)) % len(WORDS)] for j in range(length))


def texts(rows: int = 32) -> Dataset:
    return Dataset.from_list([{"text": _sentence(i, 4 + i % 6)} for i in range(rows)])


def completions(rows: int = 16) -> Dataset:
    return Dataset.from_list([{"prompt": _sentence(i), "completion": " " + _sentence(i + 1, 3)} for i in range(rows)])


def chats(rows: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": _sentence(i)},
                    {"role": "assistant", "content": _sentence(i + 1, 3)},
                ]
            }
            for i in range(rows)
        ]
    )


def preferences(rows: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": _sentence(i), "chosen": " " + _sentence(i + 1, 3), "rejected": " " + _sentence(i + 2, 4)}
            for i in range(rows)
        ]
    )


def labelled(rows: int = 16) -> Dataset:
    return Dataset.from_list(
        [{"prompt": _sentence(i), "completion": " " + _sentence(i + 1, 3), "label": i % 2 == 0} for i in range(rows)]
    )


def prompts(rows: int = 8) -> Dataset:
    return Dataset.from_list([{"prompt": _sentence(i, 3)} for i in range(rows)])
