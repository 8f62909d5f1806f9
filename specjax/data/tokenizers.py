"""Byte-level BPE: training, loading, saving and decoding as a stream."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tokenizers as hf_tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

# Begins and ends a document; id 0 in the tokenizers trained here.
END_OF_TEXT = "<|endoftext|>"

_FILE = "tokenizer.json"
_REPLACEMENT = "\ufffd"

# A merge never crosses a piece, so newlines and the indentation after them are one piece.
_PIECES = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # a word with the one character before it
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?",  # punctuation, and the line it ends
        r"[\r\n]+[ \t]*",
        r"\s+(?!\S)",  # leaves the last space of a run to the word after it
        r"\s+",
    )
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> hf_tokenizers.Tokenizer:
    """A byte-level BPE of `vocab_size` ids that gives back any text exactly.

    Id 0 is `END_OF_TEXT`, ids 1 to 256 are the bytes.

    Raises:
      ValueError: `vocab_size` has no room for the bytes and `END_OF_TEXT`.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size is {vocab_size}; need 257 or more: 256 bytes and {END_OF_TEXT}"
        )
    tokenizer = hf_tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(hf_tokenizers.Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load(directory: str | Path) -> hf_tokenizers.Tokenizer:
    """The tokenizer of `directory`/tokenizer.json, which neither pads nor truncates.

    Raises:
      ValueError: there is no such file.
    """
    path = Path(directory) / _FILE
    if not path.is_file():
        raise ValueError(f"no {_FILE} in {directory}; need a directory that holds one")
    tokenizer = hf_tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def save(tokenizer: hf_tokenizers.Tokenizer, directory: str | Path) -> None:
    """Write `directory`/tokenizer.json, making the directory where it is missing."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(directory) / _FILE))


def stream_decoder(tokenizer: hf_tokenizers.Tokenizer) -> Callable[..., str]:
    """A function `push(token_ids, final=False) -> str` that returns newly completed text.

    A character whose bytes are not all there is held back until they are, or until `final=True`
    gives out whatever is left. Special tokens are not shown. Only the tokens since the last but
    one whole character boundary are decoded again, so a stream costs time linear in its length.
    """
    window: list[int] = []
    context = 0  # leading tokens of the window whose text is out already
    shown = 0  # characters of the window's text that are out already

    def push(token_ids: Sequence[int], final: bool = False) -> str:
        nonlocal context, shown
        window.extend(int(token_id) for token_id in token_ids)
        text = tokenizer.decode(window)
        ready = text if final else text.rstrip(_REPLACEMENT)
        new = ready[shown:]
        shown = max(shown, len(ready))
        if new and len(ready) == len(text):
            # One finished stretch stays: some decoders treat the first token of a text specially.
            del window[:context]
            context = len(window)
            shown = len(tokenizer.decode(window))
        return new

    return push


class Writer:
    """The text of a stream of tokens, up to the first stop string.

    Tokens are taken one by one and text is given out as soon as it cannot become part of a stop
    string, so what comes out does not depend on how the tokens were grouped into calls. Of the
    stop strings that the text has after a token, the one that begins first is met, and of several
    that begin there the longest; the text ends right before it. Time is linear in the text.

    Args:
      tokenizer: decodes as in `stream_decoder`.
      stop: see `check_stop`.

    Attributes:
      num_tokens: tokens taken, up to and including the one that completed the stop string.
      stopped: the stop string that was met; None while there is none.
    """

    def __init__(self, tokenizer: hf_tokenizers.Tokenizer, stop: Sequence[str] = ()) -> None:
        check_stop(stop)
        self.num_tokens = 0
        self.stopped: str | None = None
        self._decode = stream_decoder(tokenizer)
        self._stops = [(string, _borders(string)) for string in stop]
        self._matched = [0] * len(stop)  # characters of each stop string that end the text so far
        self._held = ""  # as long as the longest of these matches
        self._out: list[str] = []

    @property
    def text(self) -> str:
        """All text that is out."""
        return "".join(self._out)

    def push(self, token_ids: Sequence[int], final: bool = False) -> str:
        """Takes tokens and returns the text that they complete.

        Once a stop string is met, tokens are ignored. `final=True` gives out what is held back.
        """
        start = len(self._out)
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            self._write(self._decode([token_id]))
        if final and self.stopped is None:
            self._write(self._decode([], final=True))
            self._out.append(self._held)
            self._held = ""
            self._matched = [0] * len(self._stops)
        return "".join(self._out[start:])

    def _write(self, new: str) -> None:
        """Gives out the held text and `new` up to where a stop string begins or may begin."""
        if not new:
            return
        text = self._held + new
        met = []
        for i, (string, borders) in enumerate(self._stops):
            matched = self._matched[i]
            for end, character in enumerate(new, len(self._held) + 1):
                while matched and string[matched] != character:
                    matched = borders[matched]
                matched += string[matched] == character
                if matched == len(string):
                    met.append((end - matched, -matched, string))
                    break
            self._matched[i] = matched
        if met:
            cut, _, self.stopped = min(met)
            self._held = ""
        else:
            cut = len(text) - max(self._matched, default=0)
            self._held = text[cut:]
        self._out.append(text[:cut])


def check_stop(stop: Sequence[str]) -> None:
    """Whether these can be stop strings.

    Raises:
      ValueError: one is empty or no string, or they are one string and not a list.
    """
    if isinstance(stop, str):
        raise ValueError(f"The stop strings are the string {stop!r}; need a list of strings.")
    for i, string in enumerate(stop):
        which = f"Stop string {i + 1} of {len(stop)}"
        if not isinstance(string, str):
            raise ValueError(f"{which} is {string!r}; need a string.")
        if not string:
            raise ValueError(f"{which} is empty; need at least one character.")


def _borders(string: str) -> list[int]:
    """At `n`, the longest proper prefix of `string[:n]` that also ends it, by its length.

    These are the failure links of Knuth, Morris and Pratt's search.
    """
    borders = [0, 0]
    for character in string[1:]:
        matched = borders[-1]
        while matched and string[matched] != character:
            matched = borders[matched]
        borders.append(matched + (string[matched] == character))
    return borders
