"""The encoder of a model folder that a quickstart wrote."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from m4ov.data.images import ImageGeometry
from m4ov.data.packing import Encoder
from m4ov.data.tokenizer import CHAT_TEMPLATE


def encoder_of(folder: Path) -> Encoder | None:
    """How the model in ``folder`` reads questions about images of one size; ``None``: it is not a quickstart's.

    Told by its chat template, which is this package's own, and by its processor, which has one size.
    """
    try:
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        size = processor["size"]
        side = round(size["shortest_edge"] ** 0.5)
        if template.strip() != CHAT_TEMPLATE or not side**2 == size["shortest_edge"] == size["longest_edge"]:
            return None
        geometry = ImageGeometry(
            side, processor["patch_size"], processor["merge_size"], processor["temporal_patch_size"]
        )
        return Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")), geometry)
    except (OSError, KeyError, TypeError, ValueError):
        return None
