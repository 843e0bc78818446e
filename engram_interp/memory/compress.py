"""Which tokens does the memory treat as the same word?

Paper section 2.2, appendix C: a surjection P from the V token ids onto V' compressed ids, so that "The", " the" and
"THE" address one row. The key of a token is its decoded text under NFKC, NFD, accents stripped, lower case, white space
folded; ids are given in order of first appearance. Every hash multiplier depends on V', so a wrong map changes every
address.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64
from tokenizers import Regex, Tokenizer, normalizers

_SENTINEL = "\ue000"  # keeps a lone space from being stripped to nothing


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _SENTINEL),
            normalizers.Strip(),
            normalizers.Replace(_SENTINEL, " "),
        ]
    )


def _keys(tokenizer: Tokenizer) -> list[str]:
    normalizer = _normalizer()
    keys = []
    for token_id in range(tokenizer.get_vocab_size(with_added_tokens=True)):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        if "\ufffd" in text:  # a fragment of a multi-byte character has no text of its own
            keys.append(tokenizer.id_to_token(token_id))
        else:
            keys.append(normalizer.normalize_str(text) or text)
    return keys


@dataclass(frozen=True, eq=False)
class CompressedVocabulary:
    """The map P from raw token ids to compressed ids.

    `token_map[v]` is P(v); `texts[c]` is the normalised text all tokens of compressed id `c` share.

    >>> import engram_interp
    >>> from engram_interp.memory import CompressedVocabulary
    >>> tokenizer = engram_interp.load("mini-engram").tokenizer
    >>> vocabulary = CompressedVocabulary.from_tokenizer(tokenizer)
    >>> the, spaced = (tokenizer.encode(word, add_special_tokens=False).ids[0] for word in ("The", " the"))
    >>> the == spaced, bool(vocabulary.token_map[the] == vocabulary.token_map[spaced])
    (False, True)
    >>> vocabulary.size < vocabulary.raw_size == tokenizer.get_vocab_size()
    True
    """

    token_map: Int64[np.ndarray, " V"]
    texts: tuple[str, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> CompressedVocabulary:
        """Build P from a Rust `tokenizers.Tokenizer` (a Hugging Face wrapper's `backend_tokenizer`)."""
        first: dict[str, int] = {}
        token_map = np.array([first.setdefault(key, len(first)) for key in _keys(tokenizer)], dtype=np.int64)
        return cls(token_map, tuple(first))

    @classmethod
    def identity(cls, vocab_size: int) -> CompressedVocabulary:
        """No compression: every token addresses rows of its own (Qwen3.8-Flash-Next)."""
        return cls(np.arange(vocab_size, dtype=np.int64), tuple(map(str, range(vocab_size))))

    @cached_property
    def size(self) -> int:
        """V', the number of compressed ids."""
        return int(self.token_map.max()) + 1

    @property
    def raw_size(self) -> int:
        """V, the number of raw token ids."""
        return len(self.token_map)
