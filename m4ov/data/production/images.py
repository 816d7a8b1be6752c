"""The first step: images of all sources in the run folder, each with what is true of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from m4ov.data.images import ImageError, read_image
from m4ov.data.production.sources import SOURCES, items
from m4ov.data.production.steps import BuildError, Result, Task, digest_of, rejected
from m4ov.data.records import RecordError, short
from m4ov.data.shards import image_path, read_values
from m4ov.data.whole import write_whole
from m4ov.data_recipe import SourcesConfig

_KEPT_AS_THEY_ARE = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_FIELDS = ("id", "image", "source", "truth")


def plan(config: SourcesConfig, shard_images: int) -> list[dict[str, Any]]:
    """Settings of each shard: a slice of a packaged source, or of the lines of a file.

    Raises:
        DataError: a package is missing.
        BuildError: a file is missing.
    """
    shards: list[dict[str, Any]] = []
    for name, source in SOURCES.items():
        if asked := getattr(config, name):
            options = {option: getattr(config, option) for option in source.options}
            first = config.skip.get(name, 0)
            stop = min(first + asked, source.size(**options))
            of_all = {"source": name, "options": options}
            starts = range(first, stop, shard_images)
            shards += [{**of_all, "start": at, "stop": min(at + shard_images, stop)} for at in starts]
    for number, name in enumerate(config.files):
        file = Path(name)
        if not file.is_file():
            raise BuildError(f"sources.files: {file}: no such file")
        digest, lines = digest_of(file), [where.line for where, _ in read_values(file)]
        for start in range(0, len(lines), shard_images):
            part = lines[start : start + shard_images]
            place = {"file": str(file.absolute()), "number": number, "sha256": digest}
            shards.append({**place, "first": part[0], "last": part[-1]})
    return shards


def make(task: Task) -> Result:
    """Write the images of a shard; rows: ``id``, ``image`` (relative to the run folder), ``source``, ``truth``."""
    kept: list[dict[str, Any]] = []
    turned_away: list[dict[str, Any]] = []
    for row in _of_file(task) if "file" in task.settings else _of_package(task):
        (turned_away if "reason" in row else kept).append(row)
    return Result({"images": kept, "rejected": turned_away}, {"images": len(kept), "rejected": len(turned_away)})


def _of_package(task: Task) -> Iterator[dict[str, Any]]:
    name, start, stop, options = (task.settings[key] for key in ("source", "start", "stop", "options"))
    for place, item in enumerate(items(name, start, stop, options), start):
        if isinstance(item, ImageError):
            yield rejected("images", f"{name}-{place}", "image", str(item))
            continue
        file = f"images/{name}/{item.id}.png"
        write_whole(task.path(file), _png(item.image))
        yield {"id": f"{name}-{item.id}", "image": file, "source": name, "truth": item.truth}


def _of_file(task: Task) -> Iterator[dict[str, Any]]:
    """Lines of a file that is not ours: what is wrong is named and left out."""
    file = Path(task.settings["file"])
    for where, value in read_values(file, start=task.settings["first"] - 1):
        if where.line > task.settings["last"]:
            break
        name = value.get("id") if isinstance(value, dict) else None
        shown = name if isinstance(name, str) else ""
        try:
            if isinstance(value, RecordError):
                raise value
            _check(value, where)
            path = image_path(value["image"], file.parent)
            image = read_image(path)
            as_it_is = path.suffix.lower() in _KEPT_AS_THEY_ARE
            suffix = path.suffix.lower() if as_it_is else ".png"
            target = f"images/files/{task.settings['number']:03d}-{where.line:08d}{suffix}"
            write_whole(task.path(target), path.read_bytes() if as_it_is else _png(image))
        except RecordError as error:
            yield rejected("images", shown, error.kind, error.problem, file=str(file), line=where.line)
        except ImageError as error:
            yield rejected("images", shown, "image", str(error), file=str(file), line=where.line)
        else:
            truth = {"size": list(image.size), **value.get("truth", {})}
            yield {"id": name, "image": target, "source": value.get("source", file.stem), "truth": truth}


def _check(value: Any, where: Any) -> None:
    if not isinstance(value, dict):
        raise RecordError(where, "", "field", f"expected an object, got {short(value)}")
    if unknown := [name for name in value if name not in _FIELDS]:
        raise RecordError(where, unknown[0], "field", f"{unknown[0]}: expected one of {', '.join(_FIELDS)}")
    for name in ("id", "image"):
        text = value.get(name)
        if not isinstance(text, str) or not text.isprintable() or not text:
            raise RecordError(where, name, "field", f"{name}: expected text, got {short(text)}")
    if not isinstance(value.get("truth", {}), dict):
        raise RecordError(where, "truth", "field", f"truth: expected an object, got {short(value['truth'])}")
    if not isinstance(value.get("source", ""), str):
        raise RecordError(where, "source", "field", f"source: expected text, got {short(value['source'])}")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
