"""Four-bit codes in bytes and words, and which values those take."""

from __future__ import annotations

import torch
from torch import Tensor

PER_WORD = 8


def words_for(count: int) -> int:
    """32-bit words that hold `count` codes of four bits."""
    return -(-count // PER_WORD)


def pack(codes: Tensor) -> Tensor:
    """uint8 codes [R, C] of 0..15 → uint8 [R, 4·⌈C/8⌉]: two a byte, the even column low; what is past C is 0."""
    rows, columns = codes.shape
    padded = codes.new_zeros((rows, PER_WORD * words_for(columns)), dtype=torch.uint8)
    padded[:, :columns] = codes
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 [R, 4·⌈C/8⌉] → codes [R, C]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns].contiguous()


def dense(value: Tensor) -> Tensor:
    """Contiguous, and so that its bytes can be seen as another dtype: what PyTorch calls contiguous may still have any
    stride where a size is 1, and begin anywhere."""
    value = value.contiguous()
    natural = tuple(value.shape[i + 1 :].numel() for i in range(value.dim()))
    aligned = value.storage_offset() * value.element_size() % 4 == 0
    return value if aligned and value.stride() == natural else value.clone(memory_format=torch.contiguous_format)


def to_words(packed: Tensor) -> Tensor:
    """The same bytes as little-endian int32 words, lowest nibble first (as safetensors stores them)."""
    return dense(packed).view(torch.int32)


def from_words(words: Tensor) -> Tensor:
    return dense(words).view(torch.uint8)


def pack_words(codes: Tensor) -> Tensor:
    """uint8 codes [R, C] → int32 [R, ⌈C/8⌉], lowest nibble first."""
    return to_words(pack(codes))


def unpack_words(words: Tensor, columns: int) -> Tensor:
    return unpack(from_words(words), columns)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bitwise: dtype, shape and every byte, so that NaN equals itself and −0 is not 0."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    return torch.equal(dense(a).flatten().view(torch.uint8), dense(b).flatten().view(torch.uint8))
