"""Which token ids of a segment are trained on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from ftray.chat.train_on import Ranges

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids = npt.NDArray[np.int32]


class LossMask:
    """Makes the loss mask of segments.

    Args:
        special_ids: The control tokens.
        text_of: The text of the first ids of a segment.
        normalized: A text as its ids decode.
    """

    def __init__(
        self, special_ids: Collection[int], text_of: Callable[[list[int]], str], normalized: Callable[[str], str]
    ) -> None:
        self._special_ids, self._text_of, self._normalized = special_ids, text_of, normalized

    def of_segment(self, ids: list[int], text: str, trained: bool | Ranges) -> list[bool]:
        """The mask of a segment.

        Args:
            ids: Its ids.
            text: Its text.
            trained: Ranges of the text. True means all ids up to and including the last control token: the template's text
                after it is not trained on.
        """
        if isinstance(trained, bool):
            ends = [i for i, token in enumerate(ids) if token in self._special_ids] if trained else []
            last = ends[-1] if ends else len(ids) - 1
            return [trained and i <= last for i in range(len(ids))]
        mask = [False] * len(ids)
        for start, end in trained:
            first, stop = self._token_at(ids, text, start, is_end=False), self._token_at(ids, text, end, is_end=True)
            mask[first:stop] = [True] * (stop - first)
        return mask

    def of_batch(
        self, ids: Ids, offsets: npt.NDArray[np.int64], texts: Sequence[str], trained: Sequence[bool | Ranges]
    ) -> npt.NDArray[np.bool_]:
        """The masks of many segments.

        Args:
            ids: int32 [tokens], of all segments.
            offsets: int64 [segments + 1], where each segment begins, and the end.
            texts: The segments.
            trained: Of each segment, as in `of_segment`.
        """
        import numpy as np

        table = np.zeros(max(self._special_ids, default=0) + 2, dtype=np.bool_)
        table[list(self._special_ids)] = True
        specials = np.flatnonzero(table[np.minimum(ids, len(table) - 1)])
        whole = np.asarray([each is True for each in trained], dtype=np.bool_)
        starts, ends = offsets[:-1][whole], offsets[1:][whole]
        starts, ends = starts[ends > starts], ends[ends > starts]
        before = np.searchsorted(specials, ends) - 1  # the last special token before the segment's end
        last = np.concatenate([specials, [-1]])[before]
        last = np.where(last >= starts, last, ends - 1)
        steps = np.zeros(len(ids) + 1, dtype=np.int8)
        steps[starts] += 1
        steps[last + 1] -= 1
        mask = np.cumsum(steps[:-1], dtype=np.int8).astype(np.bool_)
        for i, each in enumerate(trained):
            if not isinstance(each, bool):
                low, high = int(offsets[i]), int(offsets[i + 1])
                mask[low:high] = self.of_segment(ids[low:high].tolist(), texts[i], each)
        return mask

    def _token_at(self, ids: list[int], text: str, place: int, is_end: bool) -> int:
        """The token that has the character at a place of the text; with is_end, the number of tokens up to the place."""
        if place >= len(text):
            return len(ids)
        whole, place = self._normalized(text), len(self._normalized(text[:place]))
        low, high = 0, len(ids)
        while low < high:  # the least number of tokens whose text reaches the place
            middle = (low + high) // 2
            if self._num_characters(ids[:middle], whole) < place:
                low = middle + 1
            else:
                high = middle
        return low - 1 if not is_end and self._num_characters(ids[:low], whole) > place else low

    def _num_characters(self, ids: list[int], text: str) -> int:
        """The number of whole characters in the first ids of a text. A part of a character decodes to U+FFFD."""
        decoded = self._text_of(ids)
        return len(decoded if text.startswith(decoded) else decoded.rstrip("\ufffd"))
