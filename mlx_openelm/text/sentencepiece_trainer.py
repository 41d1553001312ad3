"""The process that trains a SentencePiece model: `sentencepiece_training` starts this file as a script.

Training is one long call into C++, which neither Ctrl-C nor another thread can end, and whose progress is a log on
standard error. Nothing else of the package is imported here, so that only Python and sentencepiece have to start.

Input: lines of text, then `END`. Output: the bytes of the model. Standard error: sentencepiece's log, and its error.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator

# The last line of input. Without it the parent has ended, or failed to read its text. No line of text has this byte.
END = b"\0\n"


def main() -> None:
    """Train on the lines of standard input; the folders of sys.path and the settings are on the command line."""
    folders, settings = json.loads(sys.argv[1])
    sys.path[:] = folders
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(sentence_iterator=_lines(), model_writer=model, **settings)
    except (RuntimeError, EOFError) as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(model.getvalue())


def _lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        if line == END:
            return
        yield line[:-1].decode()
    raise EOFError("The text ended early.")


if __name__ == "__main__":
    main()
