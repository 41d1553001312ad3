"""CoreNet's template for instructions and their answers."""

from __future__ import annotations

# CoreNet's template for CommonSense170k (corenet/data/datasets/language_modeling/commonsense_170k.py). Lines after the
# first are indented as in its source code, and the first lines end in two spaces and one space.
_INDENT = "\n" + 16 * " "
_INSTRUCTION_START = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
)
_INPUT_START = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. \n"
)


def instruction_prompt(instruction: str, input: str = "") -> str:
    """CoreNet's template up to the start of the response; nothing is stripped."""
    text = (_INPUT_START if input else _INSTRUCTION_START) + f"{_INDENT}### Instruction:{_INDENT}{instruction}{_INDENT}"
    if input:
        text += f"{_INDENT}### Input:{_INDENT}{input}{_INDENT}"
    return f"{text}{_INDENT}### Response:{_INDENT}"
