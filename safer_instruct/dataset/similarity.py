"""Find pairs that are nearly the same with MinHash and locality-sensitive hashing, and guard against test sets.

The similarity of two texts is the Jaccard index of their shingles (runs of NGRAM words, ignoring case and punctuation).
Two pairs are near duplicates if both their texts (instruction + unsafe response) and the conversations before them are
similar: "Why?" asks something different after another conversation, and so does another request after the same one or
the same system prompt. LSH over datasketch's MinHash signatures proposes candidates; each is verified on the shingles
themselves, so no pair is removed because of an estimate. With b = BANDS bands of r = BAND_ROWS hashes, a pair of
similarity s is a candidate with probability 1 - (1 - s^r)^b: 0.986 at s = 0.8, 0.9999 at 0.9, 2e-6 at 0.1.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy
import pyarrow
from datasketch import MinHash
from numpy.typing import NDArray

from safer_instruct.dataset.scratch import BATCH_ROWS, INT, Scratch, table_schema
from safer_instruct.text.examples import Example, transcript
from safer_instruct.text.exclusion import turn_keys

NGRAM = 2  # changing one word in ten keeps 64% of the two-word shingles, but only 45% of the three-word ones
BANDS, BAND_ROWS = 18, 7
SCHEME = "affine32"
NEIGHBOURS = 8  # previous members of its bucket that a text is compared with, besides the first one
_WORD = re.compile(r"\w+")
_PERMUTATIONS = MinHash(num_perm=BANDS * BAND_ROWS, seed=1, scheme=SCHEME).permutations
_SIGNATURES = pyarrow.schema(
    [("n", INT), *((name, pyarrow.list_(pyarrow.uint32())) for name in ("shingles", "said"))]
    + [(f"band{band}", pyarrow.uint64()) for band in range(BANDS)]
)
# A bucket of N texts has N^2 pairs, so each text is compared only with the first one and with those just before it.
_CANDIDATES = f"""
    WITH shared AS (SELECT {{band}} AS key FROM signatures GROUP BY key HAVING count(*) > 1),
    members AS (SELECT n, key FROM signatures JOIN shared ON key = {{band}}),
    earlier AS (
        SELECT n, first_value(n) OVER bucket AS first, list(n) OVER (
            PARTITION BY key ORDER BY n ROWS BETWEEN {NEIGHBOURS} PRECEDING AND 1 PRECEDING) AS others
        FROM members WINDOW bucket AS (PARTITION BY key ORDER BY n)
    )
    SELECT DISTINCT unnest(list_prepend(first, others)) AS earlier, n AS later FROM earlier WHERE first < n
"""
_WITH_EARLIER = (
    "SELECT earlier, later, shingles AS one, said AS one_said FROM candidates JOIN signatures ON n = earlier"
)
_VERIFIED = """
    WITH sizes AS (
        SELECT earlier, later, len(list_intersect(one, shingles)) AS common, len(one) + len(shingles) AS total,
            len(list_intersect(one_said, said)) AS common_said, len(one_said) + len(said) AS total_said
        FROM with_earlier JOIN signatures ON n = later
    )
    SELECT earlier, later FROM sizes
    WHERE common >= $1 * (total - common) AND common_said >= $1 * (total_said - common_said)
"""


def shingles(text: str) -> set[int]:
    """Return 32-bit hashes of all runs of NGRAM words; a shorter text is one shingle, an empty text has none."""
    words = _WORD.findall(text.casefold())
    runs = range(max(len(words) - NGRAM + 1, min(len(words), 1)))
    return {zlib.crc32(" ".join(words[i : i + NGRAM]).encode("utf-8", "surrogatepass")) for i in runs}


def find_near_duplicates(pairs: Iterable[tuple[int, Example]], threshold: float | None, scratch: Scratch) -> None:
    """Create the table `near_duplicates (n)`: the pairs that are nearly the same as an earlier pair that is kept.

    Args:
        pairs: (n, pair), in ascending order of n >= 0; numbers may be missing.
        threshold: Lowest similarity of near duplicates, in (0, 1]; None: no pair is one.
        scratch: Holds the index (about 350 bytes for a pair of 50 words) and the table.
    """
    numbered = iter(pairs if threshold is not None else ())
    chunks = iter(lambda: list(islice(numbered, BATCH_ROWS)), [])
    scratch.create_from_batches("signatures", _SIGNATURES, map(_signatures, chunks))
    for band in range(BANDS):  # one at a time, since one query for all 18 would need 18 times the memory
        scratch.derive(f"candidates{band}", _CANDIDATES.format(band=f"band{band}"))
    scratch.derive("candidates", " UNION ".join(f"FROM candidates{band}" for band in range(BANDS)))
    scratch.derive("with_earlier", _WITH_EARLIER)
    scratch.derive("verified", _VERIFIED, threshold, order="later, earlier")
    scratch.create("near_duplicates", table_schema(n=INT), _dropped(scratch.rows("verified", ["earlier", "later"])))


def _dropped(pairs: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int]]:
    """Yield the later text of each (earlier, later) whose earlier one is kept; the input is sorted by the later one."""
    dropped: set[int] = set()
    for earlier, later in pairs:
        if earlier not in dropped and later not in dropped:
            dropped.add(later)
            yield (later,)


def _signatures(pairs: list[tuple[int, Example]]) -> pyarrow.RecordBatch:
    found = [shingles(f"{pair.instruction}\n{pair.rejected or ''}") for _, pair in pairs]
    said = [shingles(transcript(pair.before)) for _, pair in pairs]
    # If both parts are similar, so is their union: one signature is enough to find the candidates.
    values = numpy.stack([_minhash(one | before) for one, before in zip(found, said, strict=True)])
    bands = [_mix(values[:, start : start + BAND_ROWS]) for start in range(0, BANDS * BAND_ROWS, BAND_ROWS)]
    numbers = numpy.fromiter((n for n, _ in pairs), numpy.int32, len(pairs))
    return pyarrow.record_batch([numbers, _lists(found), _lists(said), *bands], _SIGNATURES)


def _lists(sets: Sequence[set[int]]) -> pyarrow.ListArray:
    ends = numpy.cumsum([0, *map(len, sets)], dtype=numpy.int32)
    return pyarrow.ListArray.from_arrays(ends, numpy.fromiter(chain.from_iterable(sets), numpy.uint32, ends[-1]))


def _minhash(hashes: set[int]) -> NDArray[numpy.uint32]:
    # Shingles are already hashes, so they are not hashed again.
    minhash = MinHash(BANDS * BAND_ROWS, hashfunc=int, permutations=_PERMUTATIONS, scheme=SCHEME)
    minhash.update_batch(hashes)
    return minhash.hashvalues


def _mix(values: NDArray[numpy.uint32]) -> NDArray[numpy.uint64]:
    """Combine the r hashes of each row, (N, r), into one 64-bit key, (N,), with FNV-1a over the words."""
    key = numpy.full(len(values), 0xCBF29CE484222325, dtype=numpy.uint64)
    for column in values.T:
        key = (key ^ column.astype(numpy.uint64)) * numpy.uint64(0x100000001B3)
    return key


class LeakageGuard:
    """Tells whether an instruction equals, or nearly equals, one of a test set.

    Both are keys of `text/exclusion.py`, in which a later turn of a conversation includes the turns before it. A test
    set is small, so an inverted index of its shingles fits in memory and the similarity is exact.
    """

    def __init__(self, instructions: Iterable[str], threshold: float | None) -> None:
        """Index normalised instructions; a similarity of at least `threshold` is a match (None: exact matches only)."""
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
        """Return why an instruction must be left out: excluded_instruction, near_excluded_instruction, or ""."""
        if normalised in self.exact:
            return "excluded_instruction"
        if self.threshold is None:
            return ""
        own = shingles(normalised)
        common = Counter(item for shingle in own for item in self._holders.get(shingle, ()))
        near = any(n >= self.threshold * (len(own) + self._sizes[item] - n) for item, n in common.items())
        return "near_excluded_instruction" if near else ""

    def reason_of(self, pair: Example) -> str:
        """Return why a pair must be left out: the `reason` of one of its `turn_keys`, exact matches first."""
        keys = turn_keys(pair)
        return "excluded_instruction" if self.exact & set(keys) else next(filter(None, map(self.reason, keys)), "")
