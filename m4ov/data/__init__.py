"""Images and questions: where they come from, and the packed batches they become."""

from __future__ import annotations

from m4ov.data.ahead import Ahead
from m4ov.data.chat import CHATML, PLAIN, ChatEncoder
from m4ov.data.images import ImageError, ImageGeometry, image_processor, patchify
from m4ov.data.loader import PackedLoader
from m4ov.data.mixture import Mixture
from m4ov.data.packing import Encoded, Encoder
from m4ov.data.pixels import PixelOptions
from m4ov.data.records import Record, RecordError
from m4ov.data.saved import encoder_of
from m4ov.data.shards import WriteError, read_records, write_records, write_shards
from m4ov.data.sources import DataError, Sample, Split, digits, easy_vqa
from m4ov.data.stream import RecordStream, StreamError
from m4ov.data.tokenizer import to_hugging_face, train_tokenizer
from m4ov.data.validation import validate

__all__ = [
    "CHATML",
    "PLAIN",
    "Ahead",
    "ChatEncoder",
    "DataError",
    "Encoded",
    "Encoder",
    "ImageError",
    "ImageGeometry",
    "Mixture",
    "PackedLoader",
    "PixelOptions",
    "Record",
    "RecordError",
    "RecordStream",
    "Sample",
    "Split",
    "StreamError",
    "WriteError",
    "digits",
    "easy_vqa",
    "encoder_of",
    "image_processor",
    "patchify",
    "read_records",
    "to_hugging_face",
    "train_tokenizer",
    "validate",
    "write_records",
    "write_shards",
]
