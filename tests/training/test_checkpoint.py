import pytest
import torch

from diffora.training.checkpoint import DigestCheckpointIO, _restore_rng, _rng_state, newest_checkpoint


def write(folder, *epochs):
    for epoch in epochs:
        DigestCheckpointIO().save_checkpoint(
            {"epoch": epoch, "w": torch.full((100,), epoch)}, folder / f"s-{epoch:04d}.ckpt"
        )


def test_the_newest_is_found(tmp_path):
    write(tmp_path, 1, 2, 10)
    file, content = newest_checkpoint(tmp_path, "s")
    assert content["epoch"] == 10 and file.name.startswith("s-0010-")
    assert newest_checkpoint(tmp_path, "other") is None and newest_checkpoint(tmp_path / "no", "s") is None


@pytest.mark.parametrize("how", ["truncated", "one byte", "empty"])
def test_a_damaged_newest_is_named_and_the_one_before_it_used(tmp_path, caplog, how):
    write(tmp_path, 1, 2)
    newest = sorted(tmp_path.glob("*.ckpt"))[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"truncated": data[:-50], "one byte": data, "empty": b""}[how])
    file, content = newest_checkpoint(tmp_path, "s")
    assert content["epoch"] == 1 and file != newest
    assert newest.name in caplog.text and "damaged" in caplog.text


def test_what_was_not_finished_is_not_taken(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "s-0002.ckpt").write_bytes(b"killed before the name was complete")
    (tmp_path / ".s-0002.ckpt.1.part").write_bytes(b"killed while writing")
    assert newest_checkpoint(tmp_path, "s")[1]["epoch"] == 1


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(AttributeError):
        DigestCheckpointIO().save_checkpoint({"f": lambda: None}, tmp_path / "s-0001.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_random_state_returns_through_a_file(tmp_path):
    import random

    import numpy as np

    torch.save(_rng_state(), tmp_path / "rng")
    drawn = torch.rand(3), np.random.rand(3), random.random()
    _restore_rng(torch.load(tmp_path / "rng", weights_only=True))
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], again[0]) and (drawn[1] == again[1]).all() and drawn[2] == again[2]
