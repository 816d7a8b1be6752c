"""Images and questions: where they come from, and the packed batches they become."""

from __future__ import annotations

from m4ov.data.images import ImageError, ImageGeometry, image_processor, patchify
from m4ov.data.loader import PackedLoader
from m4ov.data.mixture import Mixture, Pool
from m4ov.data.packing import Encoded, Encoder
from m4ov.data.saved import encoder_of
from m4ov.data.sources import DataError, Sample, Split, digits, easy_vqa
from m4ov.data.tokenizer import to_hugging_face, train_tokenizer

__all__ = [
    "DataError",
    "Encoded",
    "Encoder",
    "ImageError",
    "ImageGeometry",
    "Mixture",
    "PackedLoader",
    "Pool",
    "Sample",
    "Split",
    "digits",
    "easy_vqa",
    "encoder_of",
    "image_processor",
    "patchify",
    "to_hugging_face",
    "train_tokenizer",
]
