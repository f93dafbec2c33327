"""What a search reads besides Γ: which steps count, the sum of early gradients, and when the selection has settled."""

import itertools
import random

import pytest
import torch

from diffora.core.dam import discretise
from diffora.core.readout import CHECKS, Readout, steps_of


def test_a_number_of_steps_or_a_share_of_them():
    assert [steps_of(amount, 40) for amount in (None, 1, 7, 0.1, 0.5, 0.99)] == [0, 1, 7, 4, 20, 40]
    assert [steps_of(0.1, total) for total in (3, 5, 25)] == [1, 1, 2]  # a share is never nothing


def test_the_early_gradient_is_of_the_first_third_of_the_gamma_steps():
    for total, warmup in itertools.product((1, 2, 3, 10, 31), (None, 1, 0.25)):
        readout = Readout("early_gradient", warmup, None)
        frozen = sum(readout.is_frozen(step, total) for step in range(total))
        read = [step for step in range(frozen, total) if readout.reads(step, total)]
        assert read == list(range(frozen, frozen + (total - frozen + 2) // 3))
    assert not any(Readout("gamma", None, None).reads(step, 30) for step in range(30))


def test_a_gradient_that_is_not_finite_is_left_out():
    readout = Readout("early_gradient", None, None)
    for grad in ([1.0, 2.0], [float("inf"), 1.0], [0.5, -1.0]):
        readout.read(torch.tensor([grad]))
    assert readout.scores(torch.zeros(1, 2)).tolist() == [[-1.5, -1.0]]


def gates_of(steps, seed):
    """Gates after each step that change their order seldom, and never in the last steps."""
    rng, gates = random.Random(seed), torch.rand(2, 4, generator=torch.Generator().manual_seed(seed))
    found = []
    for step in range(steps):
        if step < 0.6 * steps and rng.random() < 0.2:
            gates = gates[:, torch.randperm(4, generator=torch.Generator().manual_seed(100 * seed + step))]
        found.append(gates)
    return found


def stop_by_hand(gates, steps, patience, first):
    """The number of steps at which a search stops, from all masks at the ends of the tenths of a round."""
    ends = {steps * r + -(-steps * tenth // CHECKS) for r in range(len(gates) // steps) for tenth in range(1, 11)}
    masks = [(end, discretise(gates[end - 1], 2)) for end in sorted(ends) if end >= first]
    for i in range(patience, len(masks)):
        if all(torch.equal(mask, masks[i][1]) for _, mask in masks[i - patience : i]):
            return masks[i][0]
    return None


@pytest.mark.parametrize("steps", [1, 4, 10, 37])
def test_it_settles_at_the_right_check_and_resumes_exactly(steps):
    stopped = set()
    for patience, seed, warmup in itertools.product((1, 3, 6), range(4), (None, 0.2)):
        total = 3 * steps
        gates = gates_of(total, seed)
        readout = Readout("gamma", warmup, patience, lambda scores: discretise(scores, 2))
        for done in range(1, total + 1):
            assert not readout.is_settled(gates[done - 1], 0 + done, steps, total) or readout.stopped_at == done
            if readout.stopped_at is not None:
                break
            again = Readout("gamma", warmup, patience, readout.choose)
            again.load_state(readout.state())  # as a run that was stopped here and goes on
            readout = again
        assert readout.stopped_at == stop_by_hand(gates, steps, patience, 1 + steps_of(warmup, total))
        stopped.add(readout.stopped_at)
    assert steps == 1 or len(stopped) > 2


def test_it_does_not_stop_before_all_early_gradients_are_read():
    readout = Readout("early_gradient", None, 2, lambda scores: discretise(scores, 1))
    readout.read(-torch.tensor([[1.0, 2.0]]))
    ends = [done for done in range(1, 61) if readout.is_settled(torch.rand(1, 2), done, 20, 60)]
    assert ends[0] == 20  # a third of 60; the selection was the same at nine checks before


def test_patience_needs_to_know_what_would_be_selected():
    with pytest.raises(ValueError, match="patience needs choose"):
        Readout("gamma", None, 2)
