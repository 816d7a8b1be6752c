"""Records as packed rows: what a conversation becomes, and records that are packed once, to measure a model on them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from m4ov.data.chat import ChatEncoder, Conversation
from m4ov.data.images import ImageError
from m4ov.data.index import RecordIndex
from m4ov.data.pictures import named
from m4ov.data.pixels import Picture, patches_of
from m4ov.data.quarantine import Quarantine
from m4ov.data.records import Record, RecordError, Where
from m4ov.data.sources import DataError
from m4ov_kernels.packing import PackedBatch, Patches, Sample, pack_sequences


def sample_of(
    made: Conversation, patches: Mapping[Picture, Patches | ImageError], encoder: ChatEncoder, where: Where
) -> Sample:
    """A conversation with its images.

    Raises:
        RecordError: one of them could not be decoded, or is not of the size that its header said.
    """
    images = []
    for place, picture in enumerate(made.pictures):
        found = patches[picture]
        if isinstance(found, ImageError):
            raise RecordError(where, f"images[{place}]", "image", str(found), made.id)
        if math.prod(found.grid_thw) != made.tokens_of_image[place] * encoder.pixels.merge_size**2:
            problem = f"{named(picture.reference)}: its pixels are not of the size that its header said"
            raise RecordError(where, f"images[{place}]", "image", problem, made.id)
        images.append(found)
    return Sample(torch.tensor(made.input_ids), torch.tensor(made.labels), images)


def pack(samples: Sequence[Sample], encoder: ChatEncoder, dtype: torch.dtype) -> PackedBatch:
    """A row of samples; of none, a token without a label."""
    return PackedBatch.from_samples(
        samples or [Sample(torch.tensor([encoder.end_token]))],
        image_token_id=encoder.image_token,
        video_token_id=encoder.video_token,
        merge_size=encoder.pixels.merge_size,
        dtype=dtype,
    )


class RecordRows:
    """Records packed once into rows of at most ``capacity`` tokens; the same rows on every rank.

    Records are read and encoded at once, and their tokens kept; images are decoded when a row is asked for.

    Args:
        source: a file of records, a folder of such, or several.
        limit: so many records, evenly spread; 0: all.
        dtype: of ``pixel_values``.
        quarantine: a file that names what cannot be used; ``None``: it is only counted.

    Attributes:
        records, made: those that can be used, and their tokens.
        rows: places in both, of each row.
        bad: kind → how many cannot be used.

    Raises:
        RecordError: there is no such file.
        DataError: none of the records can be used.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        encoder: ChatEncoder,
        *,
        capacity: int,
        limit: int = 0,
        dtype: torch.dtype = torch.float32,
        quarantine: str | Path | None = None,
    ) -> None:
        self.encoder, self.dtype = encoder, dtype
        self.records: list[Record] = []
        self.made: list[Conversation] = []
        self.bad: Counter[str] = Counter()
        self._where: list[Where] = []
        self._quarantine = Quarantine(quarantine, 0)
        self._named: set[Where] = set()
        index, last = RecordIndex(source), ""
        count = min(limit, len(index)) if limit else len(index)
        for place in (number * len(index) // count for number in range(count)):
            where = index.where(place)
            try:
                record = index[place]
                if record is None:  # an empty line
                    continue
                made = encoder(record, Path(where.file).parent, max_length=capacity, where=where)
            except RecordError as error:
                self._refuse(error)
                last = str(error)
                continue
            self.records.append(record)
            self.made.append(made)
            self._where.append(where)
        index.close()
        if not self.made:
            found = f"none of its {count} can be used ({last})" if last else "it has none"
            raise DataError(f"expected records to learn from or to measure on; {found}")
        bins = pack_sequences([len(made) for made in self.made], capacity)
        self.rows = [sorted(found.tolist()) for found in bins]

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    def batch(self, row: int) -> tuple[list[int], PackedBatch]:
        """The places of the records in a row, and their batch. A record whose images turn out to be broken is left out;
        a row of nothing else, and one behind the last, is a token without a label."""
        places = self.rows[row] if row < len(self.rows) else []
        wanted = [picture for place in places for picture in self.made[place].pictures]
        patches = patches_of(wanted, self.encoder.pixels, self.dtype)
        found = [(place, sample) for place in places if (sample := self._sample(place, patches)) is not None]
        return [place for place, _ in found], pack([sample for _, sample in found], self.encoder, self.dtype)

    def _sample(self, place: int, patches: Mapping[Picture, Patches | ImageError]) -> Sample | None:
        try:
            return sample_of(self.made[place], patches, self.encoder, self._where[place])
        except RecordError as error:
            self._refuse(error)
            return None

    def _refuse(self, error: RecordError) -> None:
        if error.where not in self._named:
            self._named.add(error.where)
            self.bad[error.kind] += 1
            self._quarantine.add(error)
