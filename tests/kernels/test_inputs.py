"""What the layers save of their inputs."""

import weakref

import torch
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

from diffora.kernels.inputs import first_examples, input_to_save, inside_checkpoint, saved_input


def test_layers_that_read_the_same_input_save_one_copy_of_its_first_examples():
    x = torch.randn(6, 3, 4)
    first = first_examples(x, 2)
    assert first_examples(x, 2) is first
    assert torch.equal(first, x[:2]) and first.untyped_storage().nbytes() == 4 * first.numel()
    assert torch.equal(first_examples(x, 3), x[:3])
    same_values = x.clone()
    assert first_examples(same_values, 2) is not first


def test_an_input_that_was_changed_is_copied_again():
    x = torch.randn(6, 3, 4)
    before = first_examples(x, 2).clone()
    x.add_(1)
    torch.testing.assert_close(first_examples(x, 2), before + 1)


def test_the_input_and_its_copy_are_freed():
    x = torch.randn(6, 3, 4)
    refs = weakref.ref(x), weakref.ref(first_examples(x, 2))
    del x
    assert [ref() for ref in refs] == [None, None]


def test_after_a_gelu_only_the_gelus_input_is_saved():
    before = torch.randn(6, 3, 4, requires_grad=True)
    for kind in ("none", "tanh"):
        x = gelu(before, approximate=kind)
        saved, found = input_to_save(x, 2, recompute_gelu=True)
        assert saved.data_ptr() == before.data_ptr() and found == kind
        torch.testing.assert_close(saved_input(saved, found, 2), x[:2])
        assert input_to_save(x, None, recompute_gelu=False) == (x, None)


def test_checkpoints_are_noticed():
    seen = []
    checkpoint(
        lambda x: seen.append(inside_checkpoint()) or x * 2, torch.ones(1, requires_grad=True), use_reentrant=False
    )
    assert seen == [True] and not inside_checkpoint()
