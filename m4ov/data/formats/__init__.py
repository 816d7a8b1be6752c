"""What other tools' data looks like, and our records made of it: LLaMA-Factory, ms-swift, TRL, verl, OpenAI's messages,
webdataset."""

from __future__ import annotations

from m4ov.data.formats.openai import to_messages
from m4ov.data.formats.registry import FORMATS, Format, FormatError, convert, detect, named, read

__all__ = ["FORMATS", "Format", "FormatError", "convert", "detect", "named", "read", "to_messages"]
