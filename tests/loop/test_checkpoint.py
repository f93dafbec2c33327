import hashlib

import pytest
import torch

from diffora.errors import UserError
from diffora.loop.checkpoint import DigestCheckpointIO, newest_checkpoint, prune
from diffora.loop.stage import restore_rng, rng_state


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


def test_unfinished_checkpoints_are_ignored(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "s-0002.ckpt").write_bytes(b"killed before the name was complete")
    (tmp_path / ".s-0002.ckpt.1.part").write_bytes(b"killed while writing")
    assert newest_checkpoint(tmp_path, "s")[1]["epoch"] == 1


def epochs(folder):
    return sorted(int(file.name[2:7].rstrip("-.")) for file in folder.glob("*.ckpt"))


def damage(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_the_newest_two_good_ones_are_kept(tmp_path):
    """An older file is kept in place of a damaged one, also with numbers above 9999 and next to incomplete names."""
    write(tmp_path, *range(1, 6))
    prune(tmp_path, "s")
    assert epochs(tmp_path) == [4, 5]
    for file in tmp_path.glob("s-0005-*"):
        damage(file)
    (tmp_path / "s-0006.ckpt").write_bytes(b"killed before the name was complete")
    (tmp_path / "s-0007-000000000000.ckpt").write_bytes(b"of another digest")
    (tmp_path / "s-notes.ckpt").write_bytes(b"somebody else's")
    write(tmp_path, 3)
    prune(tmp_path, "s")
    assert {file.name[:6] for file in tmp_path.iterdir()} == {f"s-000{n}" for n in range(3, 8)} | {"s-note"}
    assert newest_checkpoint(tmp_path, "s")[1]["epoch"] == 4
    write(tmp_path, 9999, 10000, 10001)
    prune(tmp_path, "s")
    assert sorted(file.name[:7] for file in tmp_path.iterdir()) == ["s-10000", "s-10001", "s-notes"]
    assert newest_checkpoint(tmp_path, "s")[1]["epoch"] == 10001


def test_an_epoch_that_is_written_again_replaces_its_damaged_file(tmp_path):
    write(tmp_path, 1, 2, 20)
    damage(next(tmp_path.glob("s-0002-*")))
    (tmp_path / "s-0002.ckpt").write_bytes(b"killed before the name was complete")
    write(tmp_path, 2)
    assert epochs(tmp_path) == [1, 2, 20]


def test_an_undamaged_file_that_is_not_a_checkpoint_is_named_and_never_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "evil").touch, ()

    for content in (b"no zip", b"", Evil()):
        file = tmp_path / "s-0001.ckpt"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        file = file.rename(tmp_path / f"s-0001-{digest}.ckpt")
        with pytest.raises(UserError, match=f"{file.name} is not a checkpoint") as caught:
            newest_checkpoint(tmp_path, "s")
        assert len(caught.value.problems) == 1
        file.unlink()
    assert not (tmp_path / "evil").exists()


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(AttributeError):
        DigestCheckpointIO().save_checkpoint({"f": lambda: None}, tmp_path / "s-0001.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_random_state_returns_through_a_file(tmp_path):
    import random

    import numpy as np

    torch.save(rng_state(), tmp_path / "rng")
    drawn = torch.rand(3), np.random.rand(3), random.random()
    restore_rng(torch.load(tmp_path / "rng", weights_only=True))
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], again[0]) and (drawn[1] == again[1]).all() and drawn[2] == again[2]
