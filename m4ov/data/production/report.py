"""The page that tells what data production made: one HTML file that needs nothing else, and the same as a table."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from m4ov.data.density import AXES
from m4ov.data.images import read_image
from m4ov.data.labels import Coverage, LabelTree, balance, coverage, coverage_map, sunburst
from m4ov.data.production.flow import STEPS, Production
from m4ov.data.production.steps import read_rows
from m4ov.data.records import Record
from m4ov.data.shards import image_path, read_records
from m4ov.data.teacher.ranks import rank
from m4ov.data_recipe import DataBuildConfig

_THUMBNAIL = 320  # pixels a side, at most
_BINS = 10
# Of a step: what comes out of it, by the name of its count.
_OUT = {
    "images": "images",
    "labels": "",
    "match": "images",
    "balance": "",
    "rematch": "images",
    "allot": "images",
    "questions": "candidates",
    "check": "passed",
    "judge": "",
    "select": "accepted",
}


@dataclass(frozen=True)
class Sample:
    """A record in the gallery, with its image as a ``data:`` URI and the audit of its image."""

    record: Record
    picture: str
    audit: dict[str, Any]


def write(production: Production, config: DataBuildConfig, seconds: float) -> Coverage:
    """Write ``report.html`` into the run folder, and return what the records cover.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
        WriteError: the file cannot be written.
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'm4ov[data]'") from error
    from m4ov.data.whole import write_whole

    folder = production.folder
    topics, capabilities = (LabelTree.load(folder / "labels" / f"{name}.yaml") for name in ("topics", "capabilities"))
    covered = coverage(read_records(production.records), topics, capabilities)
    audits = list(read_rows(folder / "audit.jsonl"))
    records = {record.id: record for record in read_records(production.records)}
    source = (resources.files("m4ov.data.production") / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source).render(
        title="m4ov data: what was made",
        facts=facts(production, config, seconds),
        steps=steps(production),
        reasons=sorted(production.reasons.items(), key=lambda item: -item[1]),
        turned_away=_examples_of_reasons(folder),
        blind=blind(production),
        histogram=histogram(audits),
        axes=AXES,
        means={axis: _mean([row["scores"][axis] for row in audits]) for axis in (*AXES, "combined")},
        covered=covered,
        table=covered.table(),
        shares=balance(topics, covered.of_topics()).shares,
        topics=topics,
        coverage_map=_svg(coverage_map(covered)),
        sunbursts=[
            _svg(sunburst(topics, covered.of_topics())),
            _svg(sunburst(capabilities, covered.of_capabilities())),
        ],
        difficulties=_tally(records.values(), "difficulty"),
        kinds=_tally(records.values(), "kind"),
        spent=production.spent,
        asked=_asked(production),
        gallery=gallery(list(records.values()), audits, folder, config.gallery),
    )
    write_whole(folder / "report.html", page)
    return covered


def facts(production: Production, config: DataBuildConfig, seconds: float) -> dict[str, str]:
    """Name → value: the first table."""
    counts = production.counts
    made, accepted = counts["questions"]["candidates"], counts["select"]["accepted"]
    where = (
        "this process" if config.engine.kind == "local" else f"Ray, {config.engine.workers or os.cpu_count()} workers"
    )
    found = {
        "records": f"{accepted:,} of {made:,} questions",
        "images": f"{counts['allot']['images']:,} of {counts['images']['images']:,}",
        "rejected": f"{sum(production.reasons.values()):,}",
        "teacher": config.teacher.model or "embedded: from ground truth",
        "allotment": f"{counts['allot']['questions']:,} questions by {config.allot.by}"
        + (f"; {missing:,} not written" if (missing := counts["questions"]["missing"]) else ""),
        "engine": where,
        "shards": f"{production.made} made in this run, {production.before} were there",
        "time of this run": f"{seconds:.1f} s",
    }
    if production.spent.get("cost"):
        found["cost of this run"] = f"{production.spent['cost']:.4f}"
    return found


def steps(production: Production) -> list[dict[str, Any]]:
    """A row for each step: what came out, and what was turned away."""
    rows = []
    for name, title in STEPS.items():
        if name not in production.counts:
            continue
        counts = production.counts[name]
        other = {key: count for key, count in counts.items() if key not in (_OUT[name], "rejected") and count}
        out = counts.get(_OUT[name]) if _OUT[name] else None
        rows.append({"step": title, "out": out, "rejected": counts.get("rejected", 0), "other": other})
    return rows


def blind(production: Production) -> list[dict[str, Any]]:
    """How often an answer without the image is right: by the prior of equal questions, and by a teacher."""
    judged, checked = production.counts["judge"], production.counts["check"]
    rows = []
    if judged.get("judged_blind"):
        before = judged["guessed_before"] / judged["judged_blind"]
        after = judged["guessed_after"] / max(1, judged["kept_blind"])
        rows.append({"who": "the most frequent answer, all questions", "share": before, "of": judged["judged_blind"]})
        rows.append({"who": "the most frequent answer, kept questions", "share": after, "of": judged["kept_blind"]})
    if asked := checked.get("asked_again"):
        for who, name in (("the teacher with the image", "with"), ("the teacher without the image", "without")):
            rows.append({"who": who, "share": checked[f"right_{name}_image"] / asked, "of": asked})
    return rows


def histogram(audits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images by their combined density, in tenths, and what those images were allotted."""
    rows = [{"low": place / _BINS, "images": 0, "questions": 0, "pixels": 0} for place in range(_BINS)]
    for audit in audits:
        row = rows[min(_BINS - 1, int(audit["scores"]["combined"] * _BINS))]
        row["images"] += 1
        row["questions"] += audit["allotted"]["questions"]
        row["pixels"] += audit["allotted"]["max_pixels"]
    most = max((row["images"] for row in rows), default=0)
    return [
        {
            **row,
            "width": 100 * row["images"] / most if most else 0,
            "per_image": row["questions"] / row["images"] if row["images"] else None,
            "side": (row["pixels"] / row["images"]) ** 0.5 if row["images"] else None,
        }
        for row in rows
    ]


def gallery(records: Sequence[Record], audits: Sequence[dict[str, Any]], folder: Path, count: int) -> list[Sample]:
    """Some records, a kind of question at a time, no image twice as long as there are others."""
    of_image = {audit["id"]: audit for audit in audits}
    turn: dict[str, int] = {}
    seen: dict[str, int] = {}
    order = []
    for record in sorted(records, key=lambda one: rank("gallery", one.id)):
        kind, image = record.kind or "", record.meta["image_id"]
        turn[kind], seen[image] = turn.get(kind, -1) + 1, seen.get(image, -1) + 1
        order.append((seen[image], turn[kind], kind, record))
    chosen = [record for *_, record in sorted(order, key=lambda entry: entry[:3])][:count]
    return [Sample(record, _picture(record, folder), of_image[record.meta["image_id"]]) for record in chosen]


def print_table(production: Production, config: DataBuildConfig, seconds: float, console: Console) -> None:
    """The end of a run in the terminal."""
    table = Table(title="m4ov data", title_justify="left", show_header=False)
    for name, value in facts(production, config, seconds).items():
        table.add_row(name, value)
    table.add_section()
    for (stage, reason), count in sorted(production.reasons.items(), key=lambda item: -item[1]):
        table.add_row(f"rejected in {stage}: {reason}", f"{count:,}")
    table.add_section()
    for row in blind(production):
        table.add_row(f"right without looking: {row['who']}" if "with " not in row["who"] else row["who"], _share(row))
    console.print(table)
    console.print(f"records: {production.folder / 'records'}\nreport: {production.folder / 'report.html'}")


def _share(row: dict[str, Any]) -> str:
    return f"{row['share']:.1%} of {row['of']:,}"


def _asked(production: Production) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in production.counts.values():
        for name in ("requests", "requests_failed", "prompt_tokens", "completion_tokens"):
            total[name] = total.get(name, 0) + counts.get(name, 0)
    return total


def _examples_of_reasons(folder: Path) -> list[dict[str, Any]]:
    """The first rejection of each stage and reason."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in read_rows(folder / "rejected.jsonl"):
        if (row["stage"], row["reason"]) not in found:
            question = Record.from_json(row["record"]).question if "record" in row else row.get("question", "")
            found[row["stage"], row["reason"]] = {**row, "question": question}
    return list(found.values())


def _tally(records: Any, name: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        value = getattr(record, name) or "–"
        counts[value] = counts.get(value, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _picture(record: Record, folder: Path) -> str:
    image = read_image(image_path(record.images[0], folder / "records"))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _svg(picture: bytes) -> str:
    """As an image of its own: the ids inside one SVG would meet those of another."""
    return f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
