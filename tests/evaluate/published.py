"""The benchmarks' published layouts in small, of real images (scikit-learn's scanned digits)."""

from __future__ import annotations

import base64
import csv
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "ABCD"


@cache
def scans() -> list[tuple[bytes, int]]:
    """PNGs of 64 x 64 and what they show."""
    from sklearn.datasets import load_digits

    found = load_digits()
    made = []
    for pixels, digit in zip(found.images[:40], found.target[:40], strict=True):
        buffer = io.BytesIO()
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((64, 64)).convert("RGB").save(buffer, format="PNG")
        made.append((buffer.getvalue(), int(digit)))
    return made


def options(digit: int, count: int, turn: int = 0) -> tuple[list[str], str]:
    """That many digits as words, turned; and the letter of the right one."""
    texts = [WORDS[(digit + place) % 10] for place in range(count)]
    texts = texts[turn:] + texts[:turn]
    return texts, LETTERS[texts.index(WORDS[digit])]


def write_mmbench(path: Path, questions: int, *, rotated: bool = True, **changed: dict[int, Any]) -> Path:
    """A TSV of questions with 2, 3 and 4 options in turn. ``rotated``: with their rotations, whose image is an index.
    ``changed``: column → index → another value."""
    columns = ["index", "question", "hint", *LETTERS, "answer", "category", "image", "source", "l2-category", "split"]
    rows = []
    for place in range(questions):
        data, digit = scans()[place]
        count = 2 + place % 3
        for turn in range(count if rotated else 1):
            texts, letter = options(digit, count, turn)
            row = {"index": place + turn * 1_000_000, "question": "Which digit is it?", "answer": letter}
            row |= dict(zip(LETTERS, texts, strict=False))
            row |= {"hint": 'It is\tscanned,\nby "hand".' if place == 1 else "", "category": "ocr", "source": "digits"}
            row |= {"l2-category": "even" if digit % 2 == 0 else "odd", "split": "dev"}
            row["image"] = str(place) if turn else base64.b64encode(data).decode()
            rows.append(
                row | {name: values[row["index"]] for name, values in changed.items() if row["index"] in values}
            )
    rows = rows[1:] + rows[:1]  # a row may refer to a later one
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return path


def mmstar_rows(questions: int) -> list[dict[str, Any]]:
    """As the Parquet file has them: the options stand in the question."""
    rows = []
    for place in range(questions):
        data, digit = scans()[place]
        texts, letter = options(digit, 4, place % 4)
        listed = ", ".join(f"{name}: {text}" for name, text in zip(LETTERS, texts, strict=True))
        category = (
            ("math", "numeric commonsense and calculation") if place % 5 else ("logical reasoning", "common reasoning")
        )
        rows.append(
            {
                "index": place,
                "question": f"Which digit is it?\nOptions: {listed}",
                "image": data,
                "answer": letter,
                "category": category[0],
                "l2_category": category[1],
                "meta_info": {"source": "digits", "split": "val", "image_path": f"images/{place}.png"},
            }
        )
    return rows


def write_mmstar(path: Path, questions: int) -> Path:
    return write_parquet(path, mmstar_rows(questions))


def write_mmstar_tsv(path: Path, questions: int) -> Path:
    """VLMEvalKit's TSV: options as columns."""
    columns = ["index", "question", "hint", *LETTERS, "answer", "category", "l2-category", "image"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        table.writeheader()
        for place, row in enumerate(mmstar_rows(questions)):
            texts, _ = options(scans()[place][1], 4, place % 4)
            fields = {"image": base64.b64encode(row["image"]).decode(), "l2-category": row["l2_category"]}
            table.writerow(row | dict(zip(LETTERS, texts, strict=True)) | fields | {"question": "Which digit is it?"})
    return path


def mathvista_rows(questions: int) -> list[dict[str, Any]]:
    """Options, integers, decimals and lists in turn."""
    rows = []
    for place in range(questions):
        data, digit = scans()[place]
        kind = ("text", "integer", "float", "list")[place % 4]
        answer = {"text": WORDS[digit], "integer": str(digit), "float": f"{digit}.5", "list": f"[{digit}, {digit}]"}[
            kind
        ]
        texts = options(digit, 4)[0] if kind == "text" else None
        rows.append(
            {
                "pid": str(place + 1),
                "question": "Which digit is it?",
                "image": f"images/{place + 1}.jpg",
                "decoded_image": {"bytes": data, "path": f"{place + 1}.png"},
                "choices": texts,
                "unit": None,
                "precision": 1.0 if kind == "float" else None,
                "answer": answer,
                "question_type": "multi_choice" if kind == "text" else "free_form",
                "answer_type": kind,
                "metadata": {
                    "task": "figure question answering",
                    "skills": ["numeric commonsense"],
                    "split": "testmini",
                },
                "query": f"Hint: Please answer, e.g., 1, 2, 3, at the end.\nQuestion: Which digit is it? ({kind})",
            }
        )
    return rows


def write_mathvista(path: Path, questions: int) -> Path:
    return write_parquet(path, mathvista_rows(questions))


def mathvision_rows(questions: int) -> list[dict[str, Any]]:
    """Options and free answers in turn."""
    rows = []
    for place in range(questions):
        data, digit = scans()[place]
        texts, letter = options(digit, 4, place % 4)
        rows.append(
            {
                "id": str(place + 1),
                "question": "Which digit is it?\n<image1>",
                "options": texts if place % 2 == 0 else [],
                "image": f"images/{place + 1}.png",
                "decoded_image": {"bytes": data, "path": f"images/{place + 1}.png"},
                "answer": letter if place % 2 == 0 else str(digit),
                "solution": None,
                "level": 1 + place % 5,
                "subject": "counting",
            }
        )
    return rows


def write_mathvision(path: Path, questions: int) -> Path:
    return write_parquet(path, mathvision_rows(questions))


def write_mathvision_jsonl(folder: Path, questions: int) -> Path:
    """The repository's layout: ``data/test.jsonl`` and ``images/N.png``."""
    (folder / "images").mkdir(parents=True)
    (folder / "data").mkdir()
    lines = []
    for row in mathvision_rows(questions):
        (folder / row["image"]).write_bytes(row.pop("decoded_image")["bytes"])
        lines.append(json.dumps(row))
    path = folder / "data/test.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path
