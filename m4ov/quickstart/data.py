"""The quickstart's data: produced in the run's folder, read as pools; what the gates ask is held back of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from m4ov import sft
from m4ov.data import DataError, Pool, Record, Split, digits, easy_vqa, production
from m4ov.data.production import report
from m4ov.data.production.steps import read_rows
from m4ov.data.recorded import Asked, divide, recorded_by
from m4ov.data.sources import kind_of
from m4ov.data_command import Progress, require
from m4ov.quickstart_recipe import QuickstartConfig
from m4ov.train import RunFolder

# Questions about one figure's shape or colour. Mixtures weigh kinds by that, and by whether the answer is yes or no
# (m4ov.data.mixture).
_WEIGHED = ("colour", "shape", "existence", "negation")


@dataclass(frozen=True)
class Produced:
    """What data production gave. ``seconds``: that it took; ``None``: it was there."""

    production: production.Production
    seconds: float | None


def produce(config: QuickstartConfig, console: Console) -> Produced:
    """The records in ``<run.folder>/data``: made, or gone on with, unless they are there.

    Raises:
        BuildError, WriteError, RunFolderError: one line says what is wrong.
        DataError: a package is missing; or an image of it is broken, and ``data.on_bad_image`` is ``refuse``.
        KeyboardInterrupt: Ctrl-C; the same command goes on.
    """
    require()
    recipe = config.build()
    folder = RunFolder(recipe.run.folder, {"task": "data"})
    try:
        found, began = production.finished(recipe), time.perf_counter()
        if found is None:
            console.print("[bold]data[/bold]: questions on real images, from their ground truth")
            with Progress(console, production.STEPS) as progress:
                found = production.build(recipe, progress.watch)
            seconds: float | None = time.perf_counter() - began
            report.write(found, recipe, seconds or 0.0)
            console.print(f"data: {found.counts['select']['accepted']:,} questions in {seconds:.0f} s")
        else:
            seconds = None
            console.print(f"data: {found.counts['select']['accepted']:,} questions are there")
            if not (found.folder / "report.html").exists():
                report.write(found, recipe, 0.0)
        _check(found, config)
        return Produced(found, seconds)
    finally:
        folder.close()


def _check(found: production.Production, config: QuickstartConfig) -> None:
    broken = sum(count for (stage, _), count in found.reasons.items() if stage == "images")
    if broken and config.data.on_bad_image == "refuse":
        first = next(row for row in read_rows(found.folder / "rejected.jsonl") if row["stage"] == "images")
        more = f" (and {broken - 1} more)" if broken > 1 else ""
        raise DataError(f"{first['detail']}{more}; data.on_bad_image=skip leaves such images out")


def gather(config: QuickstartConfig, console: Console) -> sft.Material:
    """Pools of the produced records; of each some images are held back for the gates. The final figures are of
    easy-vqa's test images and the held-out digits, as ever.

    Raises:
        DataError: a pool has no record, or too few images to hold some back; or a test image is broken.
    """
    data, manifest = config.data, config.manifest()
    of_source = {source: pool for pool, sources in config.pools.items() for source in sources}

    def asked(record: Record) -> Asked | None:
        source, question, kind = str(record.meta["source"]), record.question.strip(), record.kind or "record"
        if source not in of_source:
            return None
        if source == "easy_vqa":  # which asks in small letters
            question = question[:1].lower() + question[1:]
        if source == "easy_vqa" and kind in _WEIGHED:
            kind = kind_of(question, record.answer)
        elif record.answer in ("yes", "no"):
            kind = f"yes/no, {kind}"
        return Asked(of_source[source], question, kind)

    splits = recorded_by(Path(config.build().run.folder) / "records", data.image_size, asked)
    pools: dict[str, Pool] = {}
    gates: dict[str, Split] = {}
    for name, sources in config.pools.items():
        if name not in splits:
            raise DataError(f"pools.{name}: no record of {', '.join(sources)} was produced (production.sources)")
        gates[name], training = divide(splits[name], config.gates.share)
        pools[name] = Pool(
            name,
            training,
            data.questions_per_image,
            flip=data.flip and set(sources) <= {"easy_vqa", "scenes"},
            shift=data.shift if sources == ["digits"] else 0,
        )
    general = easy_vqa("test", data.image_size, folder=data.easy_vqa, on_bad_image=data.on_bad_image)
    sft.say_left_out(general, console)
    _, domain = digits(data.image_size, held_out=data.held_out_digits, split_seed=data.split_seed)
    return sft.material_of(manifest, pools, gates, {"general": general, "domain": replace(domain, name="domain")})
