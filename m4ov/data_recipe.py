"""The configuration tree of ``m4ov data build``: plain dataclasses, checked when they are made. No torch here.

The defaults are those of ``recipes/data.yaml``; a recipe names what it changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from m4ov.recipe import RunConfig, _require


@dataclass
class SourcesConfig:
    """How many images of each source, the first ones in its order; 0: none of it. What packages carry is real data."""

    easy_vqa: int = 48  # single figures, with the questions that their authors ask
    scenes: int = 16  # four easy-vqa images as one, with boxes
    digits: int = 40  # single scanned digits
    sheets: int = 16  # several scanned digits in rows, with boxes
    flags: int = 48  # django-countries, each flag that no other country has
    photos: int = 25  # scikit-image
    files: list[str] = field(default_factory=list)  # JSONL of your own: {"id", "image", "truth"}, paths beside the file
    skip: dict[str, int] = field(default_factory=dict)  # source → images at its beginning that are left for other runs
    held_out_digits: int = 360  # of 1,797, that no run has: the model that it is for is judged by them

    def __post_init__(self) -> None:
        packaged = ("easy_vqa", "scenes", "digits", "sheets", "flags", "photos")
        for name in packaged:
            _require(getattr(self, name) >= 0, f"sources.{name}", "at least 0", getattr(self, name))
        _require(0 < self.held_out_digits < 1797, "sources.held_out_digits", "1 to 1796", self.held_out_digits)
        for name, count in self.skip.items():
            _require(name in packaged, "sources.skip", f"keys among {', '.join(packaged)}", name)
            _require(count >= 0, f"sources.skip.{name}", "at least 0", count)
        counted = self.easy_vqa + self.scenes + self.digits + self.sheets + self.flags + self.photos
        _require(bool(counted or self.files), "sources", "at least one image", counted)


@dataclass
class TeacherConfig:
    """Who writes questions: ``embedded`` (from the images' ground truth, no network), or a server."""

    kind: str = "embedded"  # "embedded", or "http": chat completions as OpenAI, vLLM and SGLang serve them
    base_url: str = ""
    model: str = ""
    api_key_env: str = ""  # name of the environment variable that holds the key; empty: none is sent
    concurrency: int = 8  # requests on the way at a time
    requests_per_minute: float = 0.0  # 0: no limit
    timeout_seconds: float = 120.0
    deadline_seconds: float = 600.0  # of a request with all its attempts
    retries: int = 4
    max_tokens: int = 2048
    cache: str = ""  # folder; empty: teacher-cache in the run folder
    prompt_price: float = 0.0  # per million tokens
    completion_price: float = 0.0
    max_failures: float = 0.5  # a shard in which more of the requests fail stops the run; it goes on from there

    def __post_init__(self) -> None:
        _require(self.kind in ("embedded", "http"), "teacher.kind", "embedded or http", self.kind)
        if self.kind == "http":
            _require(bool(self.base_url), "teacher.base_url", "the address of a server", self.base_url)
            _require(bool(self.model), "teacher.model", "the name of a model", self.model)
        _require(self.concurrency > 0, "teacher.concurrency", "at least 1", self.concurrency)
        _require(self.retries >= 0, "teacher.retries", "at least 0", self.retries)
        _require(self.max_tokens > 0, "teacher.max_tokens", "at least 1", self.max_tokens)
        _require(0 <= self.max_failures <= 1, "teacher.max_failures", "0 to 1", self.max_failures)
        for name in ("timeout_seconds", "deadline_seconds"):
            _require(getattr(self, name) > 0, f"teacher.{name}", "more than 0", getattr(self, name))
        for name in ("requests_per_minute", "prompt_price", "completion_price"):
            _require(getattr(self, name) >= 0, f"teacher.{name}", "at least 0", getattr(self, name))


@dataclass
class LabelsConfig:
    """The two label trees: a name that comes with the package, or the path of a YAML file."""

    topics: str = "topics"
    capabilities: str = "capabilities"
    extend: int = 0  # labels at most that a teacher over HTTP may propose below each label of the second level

    # Finer topics at most, from 2, that it may propose beside each that holds over twice an even share of the images
    # (of the topics that have any), which are then asked about again; 0: no topic is parted.
    balance: int = 0

    def __post_init__(self) -> None:
        _require(self.extend >= 0, "labels.extend", "at least 0", self.extend)
        _require(self.balance == 0 or self.balance >= 2, "labels.balance", "0, or at least 2", self.balance)


@dataclass
class AllotConfig:
    """How many questions each image gets, how hard, and with how many pixels."""

    by: str = "density"  # or "uniform": every image as one of the mean density, the same total, for comparison
    scorer: str = "embedded"  # of density; "ocr": with rapidocr's models reading; "teacher": by the teacher over HTTP
    power: float = 1.0  # of density: 0 gives every image as many questions, whatever the rest
    questions: int = 600  # of all images together
    max_pixels: int = 262_144  # of an image; what the densest gets

    def __post_init__(self) -> None:
        _require(self.by in ("density", "uniform"), "allot.by", "density or uniform", self.by)
        _require(self.scorer in ("embedded", "ocr", "teacher"), "allot.scorer", "embedded, ocr or teacher", self.scorer)
        _require(0 <= self.power <= 16, "allot.power", "0 to 16", self.power)
        _require(self.questions > 0, "allot.questions", "at least 1", self.questions)
        _require(self.max_pixels >= 1024, "allot.max_pixels", "at least 1024", self.max_pixels)


@dataclass
class QualityConfig:
    """What a question must pass. Every rejection keeps its reason."""

    max_question: int = 400  # characters
    max_answer: int = 600
    max_prior: float = 0.7  # of one answer among those to the same question; what is over it is cut
    prior_support: int = 4  # questions of equal words (else of one kind) from which a prior is believed
    near_text: float = 0.9  # Jaccard similarity of character 4-grams from which two questions on one image are one
    near_image: int = 2  # bits of 64 in which the perceptual hashes of near duplicates differ at most
    ask_again: bool = True  # a teacher over HTTP answers each question with the image, and without

    def __post_init__(self) -> None:
        for name in ("max_question", "max_answer", "prior_support"):
            _require(getattr(self, name) > 0, f"quality.{name}", "at least 1", getattr(self, name))
        _require(0.5 <= self.max_prior <= 1, "quality.max_prior", "0.5 to 1", self.max_prior)
        _require(0 < self.near_text <= 1, "quality.near_text", "more than 0, at most 1", self.near_text)
        _require(0 <= self.near_image <= 7, "quality.near_image", "0 to 7", self.near_image)


@dataclass
class EngineConfig:
    kind: str = "local"  # one process; or "ray": shards as tasks of a Ray cluster
    workers: int = 0  # of ray; 0: one a core
    shard_images: int = 32
    retries: int = 3  # of a shard whose worker died

    def __post_init__(self) -> None:
        _require(self.kind in ("local", "ray"), "engine.kind", "local or ray", self.kind)
        _require(self.workers >= 0, "engine.workers", "at least 0", self.workers)
        _require(self.shard_images > 0, "engine.shard_images", "at least 1", self.shard_images)
        _require(self.retries >= 0, "engine.retries", "at least 0", self.retries)


@dataclass
class DataBuildConfig:
    """Everything ``m4ov data build`` reads."""

    task: str = "data"
    run: RunConfig = field(default_factory=lambda: RunConfig(folder="runs/data"))
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    allot: AllotConfig = field(default_factory=AllotConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parquet: bool = False  # records in Parquet too
    gallery: int = 24  # samples in the report

    def __post_init__(self) -> None:
        if self.teacher.kind != "http":
            for name in ("extend", "balance"):
                asked = getattr(self.labels, name)
                _require(asked == 0, f"labels.{name}", "0 with teacher.kind=embedded", asked)
            _require(self.allot.scorer != "teacher", "allot.scorer", "no teacher with teacher.kind=embedded", "teacher")
        _require(self.gallery >= 0, "gallery", "at least 0", self.gallery)
