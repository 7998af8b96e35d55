"""Which generation of transformers runs: 5 names settings otherwise, and initializes tensors instead of modules."""

import transformers


def before_5(version: str) -> bool:
    """Whether a version of transformers is of the generation before 5.

    Raises:
        ImportError: if it is one whose loading code asks quantizers for something else; see pyproject.toml.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (4, 57) <= (major, minor) < (5, 0) or (major, minor) >= (5, 14):
        return major < 5
    raise ImportError(
        f"qbl_trl works with transformers 4.57, and with 5 from 5.14 on; {version} is installed. "
        'pip install "transformers~=4.57.6" (ORTModelForCausalLM of Optimum needs that one), or --upgrade transformers'
    )


BEFORE_5 = before_5(transformers.__version__)
