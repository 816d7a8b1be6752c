"""``pack_patches``: the limit is a copy of as many bytes as pixels are read and patches written.

Images and patches are many times larger than the caches, so nothing rotates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m4ov_bench import cases, gate, peers
from m4ov_bench.row import Peer, Row
from m4ov_bench.session import KERNEL, OURS, Session, Subject, memory_bound, row, timing
from m4ov_kernels import backend, pack_patches
from m4ov_kernels.dispatch import native_extension
from m4ov_kernels.vision.pixels import unavailable


def benchmark(session: Session) -> Iterator[Row]:
    for case in cases.PIXELS:
        if case.quick or not session.quick:
            yield from _rows(session, case)


def _rows(session: Session, case: cases.PixelCase) -> Iterator[Row]:
    random = np.random.default_rng(torch.randint(2**62, ()).item())
    arrays = [random.integers(0, 256, (case.height, case.width, 3), dtype=np.uint8) for _ in range(case.images)]
    images = [_from_array(pixels) for pixels in arrays] if case.pil else arrays
    peer = peers.pack_patches(case)
    native = unavailable("cpu") is None
    judged = images[:2]  # the others are as these
    subject = Subject(
        family="vision",
        operator="pack_patches",
        case=str(case),
        implementation=f"native {native_extension()[0].isa()}" if native else "reference",
        gate=_gate(case, judged, peer),
        ours=lambda: _pack(case, images),
        peers={"Hugging Face (PIL)": peer},
        inputs=[],
    )
    if not subject.gate.green:
        yield row(session, subject, "not measured")
        return
    calls = {OURS: lambda _: _pack(case, images)}
    if native:
        from m4ov_kernels.vision import pixels_native

        clips, layout = _prepared(case, images)
        out = pixels_native.pack_patches_fwd(clips, layout, torch.device("cpu"))
        half = out.numel() // 2
        flat = out.view(-1)
        moved = out.nbytes + sum(pixels.nbytes for pixels in arrays)

        def kernel(_: int) -> None:
            pixels_native.pack_patches_fwd(clips, layout, torch.device("cpu"), out=out)

        bound = memory_bound(kernel, moved, 0, [[(flat[:half], flat[half : 2 * half])]])
        session.say(f"pack_patches {case}: kernel")
        times = session.interleaved({OURS: bound.call, "limit": bound.limit}, session.effort)
        yield row(
            session,
            subject,
            "forward, kernel",
            **timing(times[OURS]),
            rate=moved / times[OURS].seconds,
            unit="B",
            bytes=moved,
            limit=bound.limit_name,
            limit_seconds=times["limit"].seconds * bound.scale,
            fraction=times["limit"].ratio_to(times[OURS]) * bound.scale,
        )
        calls[KERNEL] = kernel
    if not isinstance(peer, peers.Absent):
        calls["Hugging Face (PIL)"] = lambda _: peer(images)
    session.say(f"pack_patches {case}: as called")
    times = session.interleaved(calls, session.effort)
    ours = times.pop(OURS)
    others = {name: Peer(taken.seconds, taken.ratio_to(ours)) for name, taken in times.items()}
    if isinstance(peer, peers.Absent):
        others["Hugging Face (PIL)"] = Peer(absent=str(peer))
    yield row(session, subject, "forward, as called", **timing(ours), peers=others)


def _from_array(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def _options(case: cases.PixelCase) -> dict[str, Any]:
    return {
        "patch_size": case.patch_size,
        "image_mean": 0.5,
        "image_std": 0.5,
        "min_pixels": case.min_pixels,
        "max_pixels": case.max_pixels,
        "dtype": case.dtype,
    }


def _pack(case: cases.PixelCase, images: list[Any]) -> Tensor:
    return pack_patches(images, **_options(case)).pixel_values


def _prepared(case: cases.PixelCase, images: list[Any]) -> tuple[list[Any], Any]:
    """What the front door hands to the kernels."""
    from m4ov_kernels.vision.pixels import Clip, Layout, image_size
    from m4ov_kernels.vision.pixels_images import frames_of

    size = image_size(case.height, case.width, 2 * case.patch_size, case.min_pixels, case.max_pixels)
    clips = [Clip(frames_of(image, "images", None)[0], *size) for image in images]
    return clips, Layout(case.patch_size, 2, 2, (0.5,) * 3, (0.5,) * 3, case.dtype)


def _gate(case: cases.PixelCase, images: list[Any], peer: peers.Peer) -> gate.Gate:
    """Every bit of the reference's, and of Hugging Face's processor where there is one."""
    ours = _pack(case, images)
    with backend("reference"):
        expected = {"reference": _pack(case, images)}
    if not isinstance(peer, peers.Absent):
        expected["Hugging Face"] = peer(images).to(case.dtype)
    wrong = [name for name, values in expected.items() if not torch.equal(ours, values)]
    problem = f"pixel_values: other bits than {' and '.join(wrong)}" if wrong else ""
    return gate.Gate({"pixel_values": float("inf") if wrong else 0.0}, problem)
