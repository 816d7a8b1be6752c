"""``m4ov eval MODEL``: benchmarks, or the quickstart's held-out questions, asked of a checkpoint, quantised or not."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from m4ov.data import Encoder, Split
    from m4ov.data.teacher.http import HttpTeacher
    from m4ov.evaluate import Accuracy
    from m4ov.evaluate.asking import Asking, Said
    from m4ov.evaluate.scoring import Outcome
    from m4ov.train import RunFolder

QUICKSTART = "quickstart"
BENCHMARKS = ("mmbench", "mmstar", "mathvista", "mathvision")
_EPILOG = """\
Benchmarks are read from files in their published layouts (MMBench: TSV; MMStar: TSV or Parquet; MathVista: Parquet;
MathVision: Parquet, or JSONL beside its images), asked greedily with their own prompts, and read by the official rule
and by VLMEvalKit's and lmms-eval's, side by side. An answer that a rule cannot read is wrong. In DIR:
NAME.answers.jsonl (the same command goes on where it was), NAME.jsonl (a record of each question), results.json and
report.html."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's folder; quantised ones too")
    known = ",".join((QUICKSTART, *BENCHMARKS))
    parser.add_argument("--bench", default=QUICKSTART, metavar="NAMES", help=f"of {known} (default: {QUICKSTART})")
    parser.add_argument(
        "--data", action="append", default=[], metavar="PATH", help="a folder with the benchmarks' files, or NAME=FILE"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="of benchmarks (default: runs/eval/MODEL's name)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="questions of each (default: all)")
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="of an answer (default: 1024)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="answers at once (default: 32)")
    parser.add_argument("--cache-gib", type=float, default=2.0, metavar="X", help="of keys and values (default: 2)")
    parser.add_argument(
        "--numerics", default="shared", choices=("shared", "fast"), help="shared: no answer depends on the batch"
    )
    parser.add_argument("--weights", default="model", choices=("model", "int8", "int4", "fp8"), help="of the engine")
    parser.add_argument("--chat", default="auto", choices=("auto", "chatml", "plain"), help="what stands around turns")
    parser.add_argument(
        "--text-base", type=Path, metavar="DIR", help="of a run of the language model beneath, for mmstar's leakage"
    )
    parser.add_argument(
        "--judge", default="", metavar="URL", help="an OpenAI-compatible endpoint that extracts answers"
    )
    parser.add_argument("--judge-model", default="", metavar="NAME", help="as the endpoint has it")
    parser.add_argument("--judge-key-env", default="", metavar="VARIABLE", help="that holds its key (default: no key)")
    parser.add_argument("--judge-prices", default="0,0", metavar="IN,OUT", help="per million tokens, for the report")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of PyTorch (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")


def checkpoint(path: Path) -> Path:
    """A checkpoint's folder; needs no torch, so that a wrong name is answered at once.

    Raises:
        ValueError: it is none; names MODEL.
    """
    if not path.is_dir():
        raise ValueError(f"MODEL: {path}: {'is a file, not a folder' if path.exists() else 'no such folder'}")
    if not (path / "config.json").is_file():
        raise ValueError(f"MODEL: {path}: expected a checkpoint; it has no config.json")
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"MODEL: {path}: expected a checkpoint; it has no .safetensors file")
    return path


def prepare(options: argparse.Namespace) -> Path:
    """MODEL, checked, as are the other arguments."""
    names = benches(options.bench)
    for name, least in (("limit", 0), ("max_tokens", 1), ("batch", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(options, name)}")
    if not options.cache_gib > 0:
        raise ValueError(f"--cache-gib: expected more than 0, got {options.cache_gib}")
    places = data_of(options.data)
    for name in names:
        if name != QUICKSTART and name not in places and "" not in places:
            raise ValueError(f"--data: {name} needs its files: --data DIR or --data {name}=FILE")
    if bool(options.judge) != bool(options.judge_model):
        raise ValueError("--judge and --judge-model: expected both or neither")
    if options.judge_key_env and not os.environ.get(options.judge_key_env):
        raise ValueError(f"--judge-key-env: the environment variable {options.judge_key_env} is not set")
    prices(options.judge_prices)
    if options.text_base is not None and not options.text_base.is_dir():
        raise ValueError(f"--text-base: {options.text_base}: no such folder")
    return checkpoint(options.model)


def benches(text: str) -> list[str]:
    """The names in ``--bench``, each once.

    Raises:
        ValueError: one is unknown, or there is none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in (QUICKSTART, *BENCHMARKS)]
    if unknown or not names:
        known = ", ".join((QUICKSTART, *BENCHMARKS))
        raise ValueError(f"--bench: expected one or more of {known}; got {unknown[0] if unknown else repr(text)}")
    return names


def data_of(given: list[str]) -> dict[str, Path]:
    """Benchmark (empty: all others) → where its files are.

    Raises:
        ValueError: a path is none, or one is given twice.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        if not equals or name not in BENCHMARKS:
            name, rest = "", text
        if name in found:
            raise ValueError(f"--data: expected one path for {name or 'all benchmarks'}, got another: {rest}")
        if not Path(rest).exists():
            raise ValueError(f"--data: {rest}: no such file or folder")
        found[name] = Path(rest)
    return found


def prices(text: str) -> tuple[float, float]:
    """Of a million tokens asked and answered.

    Raises:
        ValueError: they are none.
    """
    try:
        asked, answered = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"--judge-prices: expected two numbers with a comma between them, got {text!r}") from None
    return asked, answered


def held_out(encoder: Encoder) -> tuple[Split, Split]:
    """The quickstart's held-out splits, at the size of image that the encoder is for."""
    from m4ov.data import digits, easy_vqa
    from m4ov.recipe import DataConfig

    options, size = DataConfig(), encoder.geometry.size
    _, domain = digits(size, held_out=options.held_out_digits, split_seed=options.split_seed)
    return easy_vqa("test", size), domain


def accuracies(
    model: Any,
    encoder: Encoder,
    splits: tuple[Split, ...],
    *,
    limit: int = 0,
    dtype: torch.dtype,
    done: Callable[[], object] = lambda: None,
) -> list[Accuracy]:
    """Exact match on each split; ``done`` is called after each."""
    from m4ov.evaluate import exact_match
    from m4ov.recipe import EvaluateConfig

    found = []
    for split in splits:
        capacity = EvaluateConfig().tokens_per_batch
        found.append(exact_match(model, split, encoder, tokens_per_batch=capacity, limit=limit, dtype=dtype))
        done()
    return found


def execute(options: argparse.Namespace, folder: Path) -> int:
    """Exit status 2 (``ValueError``, ``OSError``): the model, a file or the folder of results does not fit."""
    from rich.console import Console

    from m4ov.data.whole import write_whole
    from m4ov.evaluate import Report, html, print_table
    from m4ov.evaluate.outcomes import sections, shares_of
    from m4ov.evaluate.running import claimed, identity
    from m4ov.train import command

    command.set_up(options.threads)
    console, names = Console(), benches(options.bench)
    asked = [name for name in names if name != QUICKSTART]
    out = options.out or (Path("runs/eval") / folder.resolve().name if asked else None)
    digest = identity([path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".safetensors", ".txt")])
    found: list[Accuracy] = []
    outcomes: list[Outcome] = []
    facts = {"model": str(folder), "its files' digest": digest}
    judge = ""
    with ExitStack() as stack:
        run = None
        if out is not None:
            how = {name: getattr(options, name) for name in ("max_tokens", "numerics", "weights", "chat")}
            run = claimed(out, {"model": digest} | how)
            stack.callback(run.close)
        if QUICKSTART in names:
            found = _quickstart(options, folder, run, console)
        if asked:
            assert run is not None
            facts |= {"answers": f"greedy, at most {options.max_tokens} tokens", "asked by": _asked_by(options, folder)}
            teacher = stack.enter_context(_judge(options, run.path)) if options.judge else None
            outcomes = _benchmarks(options, folder, asked, run, teacher, console)
            if teacher is not None:
                usage = teacher.usage
                tokens = usage.prompt_tokens + usage.completion_tokens
                how_often = (
                    f"{usage.requests:,} times ({usage.cached:,} from its cache, {usage.failed:,} without an answer)"
                )
                judge = f"{teacher.name}, asked {how_often}, {tokens:,} tokens, cost {usage.cost:g}"
        report = Report(f"Evaluation of {folder.name}", facts, sections=sections(outcomes, found, judge))
        numbers: dict[str, Any] = {"model": digest}
        if found:
            numbers["accuracy"] = {result.split: result.value for result in found}
            numbers["interval"] = {result.split: list(shares_of(result).interval()) for result in found}
            numbers["kinds"] = {
                result.split: {kind: list(pair) for kind, pair in result.kinds.items()} for result in found
            }
        if outcomes:
            numbers["benchmarks"] = {outcome.benchmark.name: outcome.to_json() for outcome in outcomes}
        text = json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"
        print_table(report, console)
        if run is not None:
            write_whole(run.path / "results.json", text)
            write_whole(run.path / "report.html", html(report))
            console.print(f"report: {run.path / 'report.html'}")
    if options.json:
        write_whole(options.json, text)
    return 0


def _quickstart(options: argparse.Namespace, folder: Path, run: RunFolder | None, console: Console) -> list[Accuracy]:
    """The held-out questions: one pass, which is seconds, so that nothing of it is kept."""
    import torch

    from m4ov import quantize
    from m4ov.data import encoder_of
    from m4ov.data.whole import write_whole
    from m4ov.models.qwen3_vl import cast_parameters
    from m4ov_kernels.patches import patch

    encoder = encoder_of(folder)
    if encoder is None:
        raise ValueError(f"MODEL: {folder}: expected a quickstart's model; its tokenizer and processor are others")
    dtype = quantize.half_dtype(folder)
    if quantize.is_quantized(folder):
        model = quantize.load(folder)
        patch(model)
    else:
        model = quantize.load_source(folder, torch.float32)
        cast_parameters(model, dtype)
    splits = held_out(encoder)
    with console.status("the held-out questions"):
        found = accuracies(model, encoder, splits, limit=options.limit, dtype=dtype)
    if run is not None:
        lines = []
        for split, result in zip(splits, found, strict=True):
            step = len(split.samples), len(result.right)
            for place, (right, said) in enumerate(zip(result.right, result.said, strict=True)):
                sample = split.samples[place * step[0] // step[1]]
                row = {"benchmark": QUICKSTART, "split": split.name, "kind": sample.kind, "prompt": sample.question}
                row |= {"truth": sample.answer, "answer": said}
                lines.append(json.dumps(row | {"right": right}, ensure_ascii=False) + "\n")
        write_whole(run.path / f"{QUICKSTART}.jsonl", "".join(lines))
    return found


def _benchmarks(
    options: argparse.Namespace,
    folder: Path,
    names: list[str],
    run: RunFolder,
    teacher: HttpTeacher | None,
    console: Console,
) -> list[Outcome]:
    from m4ov.evaluate import running
    from m4ov.evaluate.benchmarks import BENCHMARKS as KNOWN
    from m4ov.evaluate.benchmarks import find

    places = data_of(options.data)
    files = {name: find(KNOWN[name], places.get(name, places.get("", Path()))) for name in names}
    ask, found = _Model(options, folder), []
    for name in names:
        with console.status(name) as status:

            def progress(done: int, of: int, name: str = name, status: Any = status) -> None:
                status.update(f"{name}: {done:,} of {of:,} answers")

            base, limit = options.text_base, options.limit
            try:
                found.append(
                    running.run(
                        KNOWN[name], files[name], run, ask, limit=limit, teacher=teacher, base=base, progress=progress
                    )
                )
            except KeyboardInterrupt:
                raise KeyboardInterrupt("interrupted; the same command goes on where it was") from None
    return found


class _Model:
    """The model, loaded when the first question is asked."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self._ask: Callable[[Iterable[Asking]], Iterator[tuple[Asking, Said]]] | None = None

    def __call__(self, askings: Iterable[Asking]) -> Iterator[tuple[Asking, Said]]:
        if self._ask is None:
            self._ask = self._load()
        return self._ask(askings)

    def _load(self) -> Callable[[Iterable[Asking]], Iterator[tuple[Asking, Said]]]:
        from m4ov import quantize
        from m4ov.data import ChatEncoder
        from m4ov.data.pretrained import reading_of
        from m4ov.evaluate.asking import by_engine, by_transformers, prompt_of
        from m4ov.generate import Engine
        from m4ov.models.qwen3_vl import from_pretrained
        from m4ov_kernels.patches import patch

        options, dtype = self.options, quantize.half_dtype(self.folder)
        reading = reading_of(self.folder, options.chat)
        encoder = ChatEncoder(reading.tokenizer, reading.pixels, reading.chat)
        if quantize.is_quantized(self.folder):
            if options.weights != "model":
                raise ValueError(f"--weights {options.weights}: {self.folder} is quantised already")
            quantised = quantize.load(self.folder)
            patch(quantised)
            return lambda askings: by_transformers(
                quantised, askings, lambda one: prompt_of(one, encoder, dtype), options.max_tokens, encoder
            )
        engine = Engine(
            from_pretrained(self.folder, dtype=dtype).eval(),
            tokenizer=encoder.tokenizer,
            end_token_ids=[encoder.end_token],
            numerics=options.numerics,
            weights=options.weights,
            cache_bytes=int(options.cache_gib * 2**30),
            max_running=options.batch,
        )
        return lambda askings: by_engine(
            engine, askings, lambda one: prompt_of(one, encoder, dtype), options.max_tokens
        )


def _asked_by(options: argparse.Namespace, folder: Path) -> str:
    from m4ov import quantize

    if quantize.is_quantized(folder):
        return "transformers' generate, one by one, with this package's quantised linears"
    return f"the embedded engine, numerics {options.numerics}, weights {options.weights}"


def _judge(options: argparse.Namespace, out: Path) -> HttpTeacher:
    from m4ov.data.teacher.http import HttpTeacher

    asked, answered = prices(options.judge_prices)
    return HttpTeacher(
        options.judge,
        options.judge_model,
        api_key_env=options.judge_key_env,
        cache=out / "judge",
        prompt_price=asked,
        completion_price=answered,
    )
