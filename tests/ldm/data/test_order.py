"""Data order: every epoch sees each sample once, and any division of a batch sees the same samples."""

import pytest
import torch

from ldm.data.order import MicroBatches, Share, epoch_order, global_batch, global_bucket_batch, in_order, never_seen
from ldm.errors import UserError


def test_an_epoch_is_a_permutation_and_epochs_differ():
    first, second = epoch_order(101, 0, 0), epoch_order(101, 0, 1)
    assert sorted(first.tolist()) == list(range(101))
    assert first.tolist() != second.tolist()
    assert epoch_order(101, 1, 0).tolist() != first.tolist()


def test_batches_cover_every_sample_once_an_epoch_across_epoch_borders():
    places = [place for step in range(21) for place in global_batch(step, 5, 7, seed=3)]  # 105 = 15 epochs of 7
    assert len(set(places)) == 105
    for epoch in range(15):
        assert sorted(index for e, index in places if e == epoch) == list(range(7))


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_any_division_sees_the_same_global_batch(accumulation, processes):
    shares = [Share(8, accumulation, processes, rank) for rank in range(processes)]
    iterators = [iter(MicroBatches(30, share, 5, 2, 6)) for share in shares]
    for step in range(2, 6):
        seen = [next(iterator) for _ in range(accumulation) for iterator in iterators]
        assert [index for micro_batch in seen for index in micro_batch] == global_batch(step, 8, 30, 5)
    assert all(next(iterator, None) is None for iterator in iterators)


def test_two_processes_see_what_accumulation_two_sees():
    one = list(MicroBatches(30, Share(8, 2, 1, 0), 0, 0, 3))
    two = [list(MicroBatches(30, Share(8, 1, 2, rank), 0, 0, 3)) for rank in range(2)]
    assert one == [batch for pair in zip(*two, strict=True) for batch in pair]


def test_a_resumed_run_sees_the_rest():
    whole = list(MicroBatches(10, Share(4), 0, 0, 9))
    assert list(MicroBatches(10, Share(4), 0, 5, 9)) == whole[5:]
    assert len(MicroBatches(10, Share(4, 2), 0, 5, 9)) == 8


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(UserError, match="10 is not a multiple of 4"):
        Share(10, 2, 2)


BUCKETS = [torch.arange(0, 11), torch.arange(11, 14), torch.arange(14, 31)]  # 2, 0 and 4 batches of four


def test_a_batch_is_of_one_bucket_and_an_epoch_sees_nothing_twice():
    left_out = []
    for epoch in range(40):
        places = [global_bucket_batch(step, 4, BUCKETS, seed=0) for step in range(epoch * 6, epoch * 6 + 6)]
        for batch in places:
            samples = [sample for _, sample in batch]
            assert sum(set(samples) <= set(bucket.tolist()) for bucket in BUCKETS) == 1
            assert len(set(samples)) == 4 and {e for e, _ in batch} == {epoch}
        seen = [sample for batch in places for _, sample in batch]
        assert len(seen) == len(set(seen)) == 24
        left_out.append(frozenset(range(31)) - set(seen))
    assert frozenset.intersection(*left_out) == {11, 12, 13}  # the small bucket alone is never seen
    assert len(set(left_out)) > 30
    assert never_seen(BUCKETS, 4) == 3


def test_buckets_are_in_another_order_in_every_epoch():
    orders = [
        tuple(global_bucket_batch(step, 4, BUCKETS, 0)[0][1] < 11 for step in range(epoch * 6, epoch * 6 + 6))
        for epoch in range(20)
    ]
    assert len(set(orders)) > 5


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_process_and_accumulation_step_has_the_same_bucket(accumulation, processes):
    shares = [Share(4, accumulation, processes, rank) for rank in range(processes)]
    iterators = [iter(MicroBatches(31, share, 5, 3, 9, BUCKETS)) for share in shares]
    for step in range(3, 9):
        seen = [next(iterator) for _ in range(accumulation) for iterator in iterators]
        assert [place for micro_batch in seen for place in micro_batch] == global_bucket_batch(step, 4, BUCKETS, 5)


def test_samples_in_order_are_in_lists_of_one_bucket():
    assert in_order(5, 2) == [[0, 1], [2, 3], [4]]
    assert in_order(15, 6, BUCKETS) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13], [14]]


def test_a_batch_that_no_bucket_fills_is_refused():
    with pytest.raises(UserError, match="batch_size 18: the largest of 3 buckets holds 17 images"):
        never_seen(BUCKETS, 18)
