"""Conversations as tokens: what the chat template says, labels on answers, image tokens as the processor counts."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from m4ov.data import to_hugging_face
from m4ov.data.chat import CHATML, PLAIN, ChatEncoder
from m4ov.data.images import ImageError
from m4ov.data.pictures import image_header, load_image, to_uri
from m4ov.data.pixels import Picture, PixelOptions, patches_of
from m4ov.data.records import Record, RecordError, assistant, image, text, user
from tests.data.record_files import draw_images, draw_records, encoded, picture, random, tokenizer

PIXELS = PixelOptions(patch_size=4, merge_size=2, min_pixels=256, max_pixels=1600)
# Qwen3-VL's, for turns of text and images.
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


def decoded(ids) -> str:
    return tokenizer().decode(list(ids), skip_special_tokens=False)


@pytest.mark.parametrize("chat", [CHATML, PLAIN], ids=["chatml", "plain"])
def test_tokens_are_what_the_chat_template_says(tmp_path, chat):
    draw = random(1)
    encoder = ChatEncoder(tokenizer(), PIXELS, chat)
    hugging_face = to_hugging_face(tokenizer())
    if chat is CHATML:
        hugging_face.chat_template = QWEN
    for record in draw_records(draw, draw_images(tmp_path, draw), 40):
        made = encoder(record, tmp_path, max_length=100_000)
        rendered = hugging_face.apply_chat_template(record.messages, tokenize=False)
        for count in made.tokens_of_image:
            rendered = rendered.replace("<|image_pad|>", "\0" * count, 1)
        expected = hugging_face(rendered.replace("\0", "<|image_pad|>"))["input_ids"]
        assert made.input_ids == expected
        assert [picture.reference for picture in made.pictures] == record.images
        # Labels: the answers and their ends.
        said = "".join(f"{turn['content'][0]['text']}<|im_end|>" for turn in record.messages[1::2])
        assert decoded(label for label in made.labels if label != -100) == said
        assert all(label in (-100, token) for label, token in zip(made.labels, made.input_ids, strict=True))


class Images(Qwen3VLProcessor):
    """Without videos, whose processor needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def test_tokens_and_pixels_are_what_the_processor_makes(tmp_path):
    """Of whole conversations, through ``apply_chat_template`` of Qwen3-VL's own processor class."""
    draw = random(7)
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        size={"shortest_edge": 256, "longest_edge": 1600},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = Images(image_processor, to_hugging_face(tokenizer()), chat_template=QWEN)
    encoder = ChatEncoder(tokenizer(), PIXELS, CHATML)
    system = {"role": "system", "content": [text("the red circle")]}
    shown = 0
    for place, record in enumerate(draw_records(draw, draw_images(tmp_path, draw), 12)):
        turns = [system, *record.messages] if place % 2 else record.messages
        made = encoder(Record("a", turns), tmp_path, max_length=100_000)
        opened = [{**turn, "content": [opened_block(block, tmp_path) for block in turn["content"]]} for turn in turns]
        expected = processor.apply_chat_template(opened, tokenize=True, return_dict=True, return_tensors="pt")
        assert made.input_ids == expected["input_ids"][0].tolist()
        if not made.pictures:
            continue
        found = patches_of(made.pictures, PIXELS, torch.float32)
        pixels = torch.cat([found[picture].pixel_values for picture in made.pictures])
        assert torch.equal(pixels, expected["pixel_values"])
        assert [list(found[picture].grid_thw) for picture in made.pictures] == expected["image_grid_thw"].tolist()
        shown += len(made.pictures)
    assert shown


def opened_block(block, folder):
    return {**block, "image": load_image(block["image"], folder)} if block["type"] == "image" else block


def test_special_tokens_in_a_text_are_text(tmp_path):
    words = "<|im_end|> <|image_pad|><|vision_start|> <|video_pad|>"
    encoder = ChatEncoder(tokenizer(), PIXELS, PLAIN)
    made = encoder(Record("a", [user(words), assistant(words)]), tmp_path, max_length=1000)
    special = {encoder.image_token, encoder.video_token, encoder.start_token, encoder.end_token}
    assert [token for token in made.input_ids if token in special] == [
        *(encoder.start_token, encoder.end_token, encoder.end_token)
    ]
    assert decoded(made.input_ids) == f"<|im_start|>{words}<|im_end|>{words}<|im_end|>"
    assert tokenizer().encode("<|im_end|>").ids == [encoder.end_token]  # the caller's tokenizer is as it was


def test_image_tokens_follow_from_the_header(tmp_path):
    """Of any size, under any budget, as many as pack_patches makes features."""
    draw = random(2)
    (tmp_path / "images").mkdir()
    for number in range(60):
        height, width = (int(side) for side in draw.integers(1, 130, 2))
        if max(height, width) > 100 * min(height, width):
            continue
        name = f"images/{number}.png"
        picture(draw, height, width).save(tmp_path / name)
        assert image_header(name, tmp_path) == (height, width)
        budget = PIXELS.budget(int(draw.integers(1, 4000)))
        assert 256 <= budget <= 1600
        (found,) = patches_of([Picture(tmp_path, name, budget)], PIXELS, torch.float32).values()
        assert not isinstance(found, ImageError), found
        time, rows, columns = found.grid_thw
        assert (time, rows * columns // 4) == (1, PIXELS.tokens(height, width, budget))


def test_a_record_asks_for_fewer_pixels(tmp_path):
    picture(random(3), 64, 64).save(tmp_path / "a.png")
    encoder = ChatEncoder(tokenizer(), PIXELS, PLAIN)
    counts = []
    for meta in ({}, {"max_pixels": 10**9}, {"max_pixels": 1024}, {"max_pixels": 1}):
        record = Record("a", [user(image("a.png"), "?"), assistant("!")], meta=meta)
        made = encoder(record, tmp_path, max_length=1000)
        counts.append(made.tokens_of_image[0])
        assert made.input_ids.count(encoder.image_token) == counts[-1]
    assert counts == [25, 25, 16, 4]  # 1600, 1600, 1024 and min_pixels = 256 pixels, of 64 a token


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_a_photo_is_seen_upright(tmp_path, format):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(random(4), 20, 40).save(tmp_path / "a.img", format, exif=exif)
    assert Image.open(tmp_path / "a.img").size == (40, 20)
    assert image_header("a.img", tmp_path) == (40, 20)  # height, width
    assert load_image("a.img", tmp_path).size == (20, 40)


def test_pixels_are_those_of_the_processor(tmp_path):
    """To the bit, for photos, palettes, transparency and grey, also embedded."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        size={"shortest_edge": 256, "longest_edge": 1600},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    photo = picture(random(5), 33, 47)
    for mode, format in (("RGB", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("RGB", "WEBP"), ("RGB", "BMP")):
        data = encoded(photo.convert(mode), format)
        wanted = Picture(tmp_path, to_uri(data), 1600)
        (found,) = patches_of([wanted, wanted], PIXELS, torch.float32).values()
        assert not isinstance(found, ImageError), found
        expected = processor([Image.open(io.BytesIO(data))], return_tensors="pt")
        assert found.grid_thw == tuple(expected["image_grid_thw"][0].tolist())
        assert torch.equal(found.pixel_values, expected["pixel_values"])


def test_truncation_drops_whole_turns_and_never_cuts_an_image(tmp_path):
    draw = random(6)
    encoder = ChatEncoder(tokenizer(), PIXELS, CHATML)
    dropped, refused, kinds = 0, 0, set()
    for record in draw_records(draw, draw_images(tmp_path, draw), 60, turns=4):
        whole = encoder(record, tmp_path, max_length=100_000)
        length = int(draw.integers(5, len(whole) + 1))
        try:
            made = encoder(record, tmp_path, max_length=length)
        except RecordError as error:
            kinds.add(error.kind)
            first = encoder(Record("a", record.messages[:2]), tmp_path, max_length=100_000)
            assert len(first) > length
            refused += 1
            continue
        turns = len(record.messages) - made.turns_dropped
        assert len(made) <= length
        assert turns % 2 == 0
        kept = encoder(Record("a", record.messages[:turns]), tmp_path, max_length=100_000)
        assert (made.input_ids, made.labels, made.pictures) == (kept.input_ids, kept.labels, kept.pictures)
        assert made.input_ids.count(encoder.image_token) == sum(made.tokens_of_image)
        if made.turns_dropped:
            more = encoder(Record("a", record.messages[: turns + 2]), tmp_path, max_length=100_000)
            assert len(more) > length  # no turn was dropped for nothing
            dropped += 1
            with pytest.raises(RecordError, match="expected at most"):
                encoder(record, tmp_path, max_length=length, drop_turns=False)
    assert dropped
    assert refused
    assert kinds == {"too long"}


def test_what_it_refuses(tmp_path):
    encoder = ChatEncoder(tokenizer(), PIXELS)
    with pytest.raises(RecordError, match=r"messages\[0\]\.content\[1\]\.image: none\.png: no such file"):
        encoder(Record("a", [user("?", image("none.png")), assistant("!")]), tmp_path, max_length=100)
    with pytest.raises(RecordError, match="expected an answer"):
        encoder(Record("a", [user("?")], reward={"a": 1}), tmp_path, max_length=100)
    with pytest.raises(ValueError, match="min_pixels: expected 1 to max_pixels = 10; got 20"):
        PixelOptions(4, 2, 20, 10)
    for reference, problem in (
        ("data:image/png;base64,%%%", "not base64"),
        ("data:image/png,abc", "expected data:…;base64"),
        ("https://x.org/a.png", "not a file"),
        ("\0", "no such file"),
        ("x" * 5000, "cannot be read|no such file"),
    ):
        with pytest.raises(ImageError, match=problem) as caught:
            image_header(reference, tmp_path)
        assert len(str(caught.value)) < 1000
