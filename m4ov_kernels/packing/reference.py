"""The definition of ``pack_sequences``, in plain Python."""

from __future__ import annotations

from bisect import bisect_left, insort


def pack_sequences(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest bin that has room for it (of several, the one that
    a sequence was put into last), or else into a new one."""
    bins: list[list[int]] = []
    waiting: dict[int, list[int]] = {}  # room left → its bins
    rooms: list[int] = []  # that occur, ascending
    for sequence in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, lengths[sequence])
        if place == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            chosen = waiting[room].pop()
            if not waiting[room]:
                del waiting[room], rooms[place]
        bins[chosen].append(sequence)
        room -= lengths[sequence]
        if room not in waiting:
            waiting[room] = []
            insort(rooms, room)
        waiting[room].append(chosen)
    return bins
