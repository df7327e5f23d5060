import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmclip.data.sampling import Purpose, Schedule, image_key, keyed_uniform, order_of_epoch

GOLDEN = [[0.9311460792508359, 0.09318725857297372, 0.7221777582352165]]
KEYS = np.array([image_key(f"image-{i}") for i in range(50)], np.uint64)


@pytest.mark.ledger("random numbers")
def test_a_draw_depends_on_its_image_and_not_on_its_neighbours():
    together = keyed_uniform(3, Purpose.AUGMENT, np.arange(50), KEYS, 6)
    for i in (0, 17, 49):
        alone = keyed_uniform(3, Purpose.AUGMENT, np.array([i]), KEYS[i : i + 1], 6)
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.parametrize(
    ("seed", "purpose", "epoch"),
    [(4, Purpose.AUGMENT, 0), (3, Purpose.ORDER, 0), (3, Purpose.AUGMENT, 1)],
)
def test_seed_purpose_and_epoch_each_change_every_draw(seed: int, purpose: Purpose, epoch: int):
    base = keyed_uniform(3, Purpose.AUGMENT, np.zeros(50), KEYS, 4)
    other = keyed_uniform(seed, purpose, np.full(50, epoch), KEYS, 4)
    assert not (base == other).any()
    assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.25  # n = 200: 3.5 deviations


def test_draws_are_uniform():
    u = keyed_uniform(0, Purpose.AUGMENT, np.zeros(50), KEYS, 2000).ravel()
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    chi2 = ((counts - 5000) ** 2 / 5000).sum()
    assert chi2 < 43.8  # 19 degrees of freedom: exceeded once in a thousand


def test_the_first_draws_of_a_known_image_never_change():
    # A golden value: resuming a run of an older version must see the same images.
    u = keyed_uniform(7, Purpose.AUGMENT, np.array([2]), np.array([image_key("a")], np.uint64), 3)
    np.testing.assert_allclose(u, GOLDEN, rtol=0, atol=1e-15)


@given(st.integers(2, 40), st.integers(1, 30), st.integers(0, 5))
def test_every_epoch_reads_every_row_once(n: int, batch_size: int, seed: int):
    schedule = Schedule(KEYS[:n], batch_size, seed)
    steps = -(-3 * n // batch_size)
    drawn = [schedule.rows(step) for step in range(steps)]
    rows = np.concatenate([rows for rows, _ in drawn])
    epochs = np.concatenate([epochs for _, epochs in drawn])
    for epoch in range(3):
        assert sorted(rows[epochs == epoch][:n]) == list(range(n))


def test_two_epochs_have_different_orders():
    assert (order_of_epoch(0, 0, KEYS) != order_of_epoch(0, 1, KEYS)).any()


def test_no_rows_are_too_few():
    with pytest.raises(ValueError, match="there are no rows to read from"):
        Schedule(np.zeros(0, np.uint64), 4, seed=0)
