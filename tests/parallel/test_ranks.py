"""Functions on several ranks: what they return, how they fail, and what is said of a rank that does not come."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from m4ov.parallel import collectives, hang, ranks
from m4ov.parallel.ledger import Ledger
from m4ov.parallel.mesh import Layout, Mesh


def own_rank(factor: int) -> tuple[int, int]:
    total = torch.tensor([dist.get_rank()])
    dist.all_reduce(total)
    return factor * dist.get_rank(), int(total)


def test_what_the_ranks_return():
    assert ranks.run(own_rank, 3, 10) == [(0, 3), (10, 3), (20, 3)]


def failing() -> None:
    if dist.get_rank() == 1:
        raise ArithmeticError("rank one is tired")


def test_a_rank_that_fails_is_named():
    with pytest.raises(ranks.RankError, match=r"(?s)--- rank 1.*ArithmeticError: rank one is tired"):
        ranks.run(failing, 2, collective_timeout=2)


def absent(rank: int) -> None:
    mesh = Mesh(Layout(dp_shard=2, tp=2), timeout=timedelta(seconds=1))
    if dist.get_rank() == rank:
        time.sleep(4)
        raise SystemExit
    with hang.named(mesh.axis_of_group(), patience=1.0):
        mesh.all_reduce(torch.ones(3), ("tp",))


def test_a_collective_that_hangs_names_itself_and_the_missing_ranks():
    with pytest.raises(ranks.RankError) as failure:
        ranks.run(absent, 4, 3)
    expected = "HungRankError: all_reduce over tp (ranks 2, 3) did not complete: ranks 2 waited, ranks 3 did not come"
    assert expected in str(failure.value)


def busy() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_a_rank_that_does_not_end_says_where_it_stands():
    with pytest.raises(ranks.RankError, match=r"(?s)rank 1 did not end; it stood at.*in busy"):
        ranks.run(busy, 2, timeout=3, collective_timeout=20)


def collected(total: int) -> dict[str, list]:
    """Results and gradients of the differentiable collectives, of values that every rank makes alike."""
    generator = torch.Generator().manual_seed(total)
    group, size = dist.group.WORLD, dist.get_world_size()
    whole = torch.randn(size, total, 3, generator=generator, dtype=torch.float64)
    grads = torch.randn(size, total, 3, generator=generator, dtype=torch.float64)
    rank = dist.get_rank()
    place = collectives.share(total, group)
    own = whole[0, place].clone().requires_grad_()
    gathered = collectives.gather_rows(own, collectives.shares(total, size), group)
    torch.testing.assert_close(gathered, whole[0], rtol=0, atol=0)
    gathered.backward(grads[rank])
    torch.testing.assert_close(own.grad, grads.sum(0)[place])
    counts = [3, 0, total, 1]  # any, with padding in the middle
    uneven = whole[0].expand(4, -1, -1)[rank, : min(counts[rank], total)].clone().requires_grad_()
    counts = [min(count, total) for count in counts]
    gathered = collectives.gather_rows(uneven, counts, group)
    begin = sum(counts[:rank])
    torch.testing.assert_close(gathered, torch.cat([whole[0][:count] for count in counts]), rtol=0, atol=0)
    gathered.backward(torch.full_like(gathered, float(rank + 1)) * torch.arange(len(gathered))[:, None])
    own_rows = torch.arange(begin, begin + counts[rank], dtype=torch.float64)
    torch.testing.assert_close(uneven.grad, 10 * own_rows[:, None].expand(-1, 3))
    part = whole[rank].clone().requires_grad_()
    scattered = collectives.scatter_rows(part, group)
    torch.testing.assert_close(scattered, whole.sum(0)[place])
    scattered.backward(grads[0, place])
    torch.testing.assert_close(part.grad, grads[0], rtol=0, atol=0)
    # rank r sends (r + s) % 3 rows to rank s
    sent = [(rank + other) % 3 for other in range(size)]
    rows = torch.full((sum(sent), 2), float(rank)).requires_grad_()
    received = collectives.exchange_rows(rows, sent, sent, group)
    assert received[:, 0].tolist() == [float(other) for other in range(size) for _ in range(sent[other])]
    received.backward(received.detach() + 1)
    torch.testing.assert_close(rows.grad, rows.detach() + 1)
    return place.stop - place.start


@pytest.mark.parametrize("total", [1, 7, 8])
def test_collectives_of_uneven_rows(total):
    assert sum(ranks.run(collected, 4, total)) == total


def counted() -> dict:
    mesh = Mesh(Layout(dp_shard=2, tp=2))
    with Ledger(mesh.axis_of_group()) as ledger:
        rows = torch.ones(3, 2, requires_grad=True)
        collectives.gather_rows(rows, [3, 3], mesh.group("tp")).sum().backward()
        mesh.all_reduce(torch.ones(5, dtype=torch.bfloat16), ("dp_shard", "tp"))
        collectives.exchange_rows(torch.ones(2, 1), [1, 1], [1, 1], mesh.group("dp_shard"))
    return ledger.table()


def test_the_ledger_counts_by_axis_and_kind():
    expected = {
        "dp_shard": {"all_reduce": [1, 10], "all_to_all": [1, 8]},
        "tp": {"all_gather": [1, 48], "all_reduce": [1, 10], "reduce_scatter": [1, 48]},
    }
    assert ranks.run(counted, 4) == [expected] * 4
