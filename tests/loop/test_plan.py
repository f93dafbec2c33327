"""The segments of fine-tuning against a plain walk over all steps."""

import pytest

from diffora.loop.plan import plan_of


def walked(n, epochs, max_steps, every):
    """(step after the segment, whether it evaluates) for each segment, step by step."""
    total = epochs * n if max_steps is None else max_steps
    found = []
    for step in range(1, total + 1):
        in_epoch = (step - 1) % n + 1
        ends = in_epoch == n
        if every is None:
            due = ends
        elif isinstance(every, int):
            due = step % every == 0
        else:  # the last whole step before each multiple of the fraction
            due = ends or any(int(every * j * n + 1e-9) == in_epoch for j in range(1, n * 2))
        due = due or step == total
        if ends or due:
            found.append((step, due))
    return found


@pytest.mark.parametrize("every", [None, 1, 2, 3, 5, 7, 12, 100, 0.5, 0.1, 0.3, 0.4, 0.9])
@pytest.mark.parametrize(("n", "epochs", "max_steps"), [(1, 3, None), (5, 4, None), (12, 2, None), (10, 2, 3),
                                                        (10, 2, 10), (10, 2, 37), (3, 9, 1), (7, 1, 28)])  # fmt: skip
def test_segments_are_those_of_a_walk_over_all_steps(n, epochs, max_steps, every):
    plan = plan_of(n, epochs, max_steps, every)
    found = [(segment.epoch * n + segment.stop, segment.evaluates) for segment in plan]
    assert found == walked(n, epochs, max_steps, every)
    steps = [(s.epoch, step) for s in plan for step in range(s.first, s.stop)]
    assert steps == [divmod(step, n) for step in range(plan.total)]  # each step once, none across the end of an epoch
    assert plan.epochs == pytest.approx(plan.total / n, abs=1e-4)


def test_a_plan_of_a_billion_epochs_takes_no_memory():
    plan = plan_of(10, 10**9, every=0.5)
    assert len(plan) == 2 * 10**9 and plan[10**9].epoch == 5 * 10**8


def test_a_fraction_smaller_than_a_step_evaluates_after_each_step():
    assert [s.stop for s in plan_of(3, 1, every=0.01)] == [1, 2, 3]
