"""Which texts are nearly the same: shingles, MinHash with locality-sensitive hashing, and a guard against test sets.

Two texts are as similar as the Jaccard index of their shingles (runs of NGRAM words, case and punctuation aside).
Candidates come from LSH over datasketch's MinHash signatures; each is verified on the shingles themselves, so nothing
is removed by an estimate. Symbols: b = BANDS bands of r = BAND_ROWS hashes; a pair of similarity s is a candidate with
probability 1 - (1 - s^r)^b: 0.986 at s = 0.8, 0.9999 at 0.9, 2e-6 at 0.1.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy
from datasketch import MinHash
from numpy.typing import NDArray

NGRAM = 2  # one word changed in ten leaves 64% of the shingles of two words, and 45% of those of three
BANDS, BAND_ROWS = 18, 7
SCHEME = "affine32"
CHUNK_ROWS = 8192
NEIGHBOURS = 8  # members of one bucket that each further one is compared with, besides the first
_WORD = re.compile(r"\w+")
_PERMUTATIONS = MinHash(num_perm=BANDS * BAND_ROWS, seed=1, scheme=SCHEME).permutations


def shingles(text: str) -> set[int]:
    """32-bit hashes of all runs of NGRAM words; a text of fewer words is one shingle, an empty one has none."""
    words = _WORD.findall(text.casefold())
    runs = range(max(len(words) - NGRAM + 1, min(len(words), 1)))
    return {zlib.crc32(" ".join(words[i : i + NGRAM]).encode("utf-8", "surrogatepass")) for i in runs}


def similarity(first: set[int], second: set[int]) -> float:
    """Jaccard index; two empty sets are equal."""
    union = len(first | second)
    return len(first & second) / union if union else 1.0


class NearDuplicates:
    """Finds, among texts that are added one by one, those that are nearly the same as an earlier one that stays.

    Memory: 144 bytes of band keys a text and 4 a shingle (about 0.3 kB for 40 words); with a `folder` both lie there
    instead, and only one band at a time (16 bytes a text) is in memory.
    """

    def __init__(self, threshold: float, folder: Path | None = None) -> None:
        """Start empty.

        Args:
            threshold: Similarity from which a text is a near duplicate, in (0, 1].
            folder: Where the index lies; None: in memory.
        """
        self.threshold = threshold
        self._bands = [_Column(numpy.uint64, folder, f"band{i:02d}") for i in range(BANDS)]
        self._shingles = _Column(numpy.uint32, folder, "shingles")
        self._ends = _Column(numpy.int64, folder, "ends")
        self._num_shingles = 0
        self._waiting: list[set[int]] = []

    def add(self, text: str) -> None:
        """Take in the next text; its number is how many came before it."""
        self._waiting.append(shingles(text))
        if len(self._waiting) == CHUNK_ROWS:
            self._flush()

    def duplicates(self) -> NDArray[numpy.bool_]:
        """Return for each text whether it is nearly the same as an earlier one that is not itself such a one."""
        self._flush()
        ends = self._ends.array()
        dropped = numpy.zeros(len(ends), dtype=bool)
        flat = self._shingles.array()
        for first, second in self._candidates():
            if dropped[first] or dropped[second]:
                continue
            one, other = (flat[ends[i - 1] if i else 0 : ends[i]] for i in (first, second))
            common = len(numpy.intersect1d(one, other, assume_unique=True))
            union = len(one) + len(other) - common
            dropped[second] = common >= self.threshold * union
        return dropped

    def _flush(self) -> None:
        if not self._waiting:
            return
        signatures = numpy.stack([_signature(one) for one in self._waiting])
        for band, column in enumerate(self._bands):
            column.append(_mix(signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS]))
        sorted_shingles = [numpy.sort(numpy.fromiter(one, numpy.uint32, len(one))) for one in self._waiting]
        self._shingles.append(numpy.concatenate(sorted_shingles))
        ends = self._num_shingles + numpy.cumsum([len(one) for one in self._waiting])
        self._ends.append(ends)
        self._num_shingles = int(ends[-1])
        self._waiting = []

    def _candidates(self) -> Iterator[tuple[int, int]]:
        """Yield pairs (earlier, later) that share a bucket of some band, by the later one's number."""
        found = numpy.empty(0, dtype=numpy.uint64)
        for column in self._bands:
            keys = column.array()
            order = numpy.argsort(keys, kind="stable")
            keys = keys[order]
            starts = numpy.flatnonzero(numpy.concatenate([[True], keys[1:] != keys[:-1]]))
            firsts = order[numpy.repeat(starts, numpy.diff(numpy.append(starts, len(keys))))]
            pairs = [_pack(firsts, order)[firsts != order]]
            for lag in range(1, NEIGHBOURS + 1):
                same = keys[lag:] == keys[:-lag]
                pairs.append(_pack(order[:-lag][same], order[lag:][same]))
            found = numpy.union1d(found, numpy.concatenate(pairs))
        for packed in found.tolist():
            yield packed & 0xFFFFFFFF, packed >> 32


def _pack(earlier: NDArray[numpy.int64], later: NDArray[numpy.int64]) -> NDArray[numpy.uint64]:
    """Two numbers below 2^32 as one that sorts by the later."""
    return (later.astype(numpy.uint64) << numpy.uint64(32)) | earlier.astype(numpy.uint64)


def _signature(hashes: set[int]) -> NDArray[numpy.uint32]:
    minhash = MinHash(BANDS * BAND_ROWS, hashfunc=_as_it_is, permutations=_PERMUTATIONS, scheme=SCHEME)
    minhash.update_batch(hashes)
    return minhash.hashvalues


def _as_it_is(hash: int) -> int:
    return hash


def _mix(values: NDArray[numpy.uint32]) -> NDArray[numpy.uint64]:
    """(N, r) hashes -> (N,) one 64-bit key each (FNV-1a over the words)."""
    key = numpy.full(len(values), 0xCBF29CE484222325, dtype=numpy.uint64)
    for column in values.T:
        key = (key ^ column.astype(numpy.uint64)) * numpy.uint64(0x100000001B3)
    return key


class _Column:
    """Numbers that are appended, then read as one array: in memory, or in a file."""

    def __init__(self, kind: type[numpy.generic], folder: Path | None, name: str) -> None:
        self._kind = kind
        self._parts: list[NDArray] = []
        self._path = None if folder is None else folder / f"{name}.bin"

    def append(self, values: NDArray) -> None:
        values = values.astype(self._kind, copy=False)
        if self._path is None:
            self._parts.append(values)
        else:
            with self._path.open("ab") as file:
                values.tofile(file)

    def array(self) -> NDArray:
        if self._path is None:
            self._parts = [numpy.concatenate(self._parts)] if self._parts else []
            return self._parts[0] if self._parts else numpy.empty(0, dtype=self._kind)
        if not self._path.exists() or not self._path.stat().st_size:
            return numpy.empty(0, dtype=self._kind)
        return numpy.memmap(self._path, dtype=self._kind, mode="r")


class LeakageGuard:
    """Tells whether an instruction is one of a test set's, exactly or nearly: compared with all that share a shingle.

    A test set is small, so its shingles are an inverted index in memory and the similarity is exact.
    """

    def __init__(self, instructions: Iterable[str], threshold: float | None) -> None:
        """Index the test set.

        Args:
            instructions: Normalised (`examples.normalise`).
            threshold: Similarity from which an instruction is nearly one of them; None: exact matches only.
        """
        self.exact = frozenset(instructions)
        self.threshold = threshold
        self._sizes: list[int] = []
        self._holders: defaultdict[int, list[int]] = defaultdict(list)
        for text in sorted(self.exact) if threshold is not None else ():
            found = shingles(text)
            for shingle in found:
                self._holders[shingle].append(len(self._sizes))
            self._sizes.append(len(found))

    def reason(self, normalised: str) -> str:
        """Return why the instruction must stay out: excluded_instruction, near_excluded_instruction, or ""."""
        if normalised in self.exact:
            return "excluded_instruction"
        if self.threshold is None:
            return ""
        own = shingles(normalised)
        common = Counter(item for shingle in own for item in self._holders.get(shingle, ()))
        near = any(n >= self.threshold * (len(own) + self._sizes[item] - n) for item, n in common.items())
        return "near_excluded_instruction" if near else ""


def recall(similarity_of_pair: float) -> float:
    """Probability that a pair of this similarity is a candidate."""
    return 1 - (1 - similarity_of_pair**BAND_ROWS) ** BANDS


__all__: Sequence[str] = ("LeakageGuard", "NearDuplicates", "recall", "shingles", "similarity")
