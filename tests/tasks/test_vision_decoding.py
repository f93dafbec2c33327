"""``task.cache_pixels=false``: images are decoded for every batch, with the same result; changed files are named."""

import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_vision import SMALL, problems, to_parquet, write_folders
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.levit.image_processing_pil_levit import LevitImageProcessorPil
from transformers.models.poolformer.image_processing_pil_poolformer import PoolFormerImageProcessorPil

from diffora.errors import UserError
from diffora.loop.data import eval_loader
from diffora.places import default_cache_dir
from diffora.tasks import vision
from diffora.tasks.base import get_task
from diffora.tasks.images.batches import ImageCollate
from diffora.tasks.images.decode import pixel_bytes, shrink
from diffora.tasks.images.preprocessing import Preprocessing


@pytest.fixture(params=["folders", "parquet"])
def both(request, cfg, tmp_path):
    """The task of the same images, with cached pixels and without."""
    path = write_folders(tmp_path / "images")
    if request.param == "parquet":
        path = to_parquet(path, tmp_path / "table")

    def make(cache_pixels):
        made = cfg("task=imagefolder", "model=tiny_vit", f"task.path={path}", f"task.cache_pixels={cache_pixels}")
        return get_task(made.task)

    return make("true"), make("false")


def encoded_files():
    return {file.stat().st_size for file in (default_cache_dir() / "images").glob("*.arrow")}


def test_batches_are_equal_to_those_of_cached_pixels(both):
    encoded = [task.encode(task.load().train, SMALL, training=True) for task in both]
    assert "pixels" in encoded[0].column_names and "pixels" not in encoded[1].column_names
    for training in (True, False):
        cached, decoded = (
            task.collate(SMALL, training)(rows[[3, 0, 7]] | {"draw": (7, 2, 0)})
            for task, rows in zip(both, encoded, strict=True)
        )
        assert cached.keys() == decoded.keys() and all(cached[name].equal(decoded[name]) for name in cached)
    assert [both[i].account("train", SimpleNamespace(rows=rows, encoded=rows)) for i, rows in enumerate(encoded)]


def test_workers_give_the_same_and_get_the_rows_as_a_path(both):
    task = both[1]
    rows = task.load().train
    encoded = task.encode(rows, SMALL, training=False)
    assert encoded.cache_files and len(pickle.dumps(encoded)) < 4000  # spawned workers map the file again
    found = [
        torch.cat([batch["pixel_values"] for batch in eval_loader(encoded, task.collate(SMALL, False), 5, None, n)])
        for n in (0, 1)
    ]
    assert found[0].equal(found[1]) and len(found[0]) == 12


def test_images_that_cannot_be_decoded_are_named_before_training(cfg, tmp_path):
    path = write_folders(tmp_path / "images")
    (path / "train" / "cat" / "0.png").write_bytes(b"no image")
    messages = []
    for cached in ("true", "false"):
        made = cfg("task=imagefolder", "model=tiny_vit", f"task.path={path}", f"task.cache_pixels={cached}")
        task = get_task(made.task)
        messages.append(problems(task.encode, task.load().train, SMALL, True))
    assert messages[0] == messages[1] and "0.png: cannot be decoded" in messages[0][0]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("change", ["other", "gone"])
def test_a_file_that_changes_during_the_run_is_named(cfg, tmp_path, change, num_workers):
    path = write_folders(tmp_path / "images")
    task = get_task(cfg("task=imagefolder", "model=tiny_vit", f"task.path={path}", "task.cache_pixels=false").task)
    encoded = task.encode(task.load().train, SMALL, training=False)
    file = path / "train" / "dog" / "2.png"
    shutil.copy(file.with_name("4.png"), file) if change == "other" else file.unlink()
    with pytest.raises(UserError) as caught:
        list(eval_loader(encoded, task.collate(SMALL, False), 4, None, num_workers))
    expected = "has changed since this run began" if change == "other" else "cannot be read any more: no such file"
    assert str(caught.value).startswith(f"{file} {expected}") and "Traceback" not in str(caught.value)


def test_the_same_images_in_another_folder_are_found_there(cfg, tmp_path):
    for name in ("one", "two"):
        path = write_folders(tmp_path / name)
        task = get_task(cfg("task=imagefolder", "model=tiny_vit", f"task.path={path}", "task.cache_pixels=false").task)
        encoded = task.encode(task.load().train, SMALL, training=False)
        assert all(str(path) in image["path"] for image in encoded["image"])


def test_pixels_that_do_not_fit_on_the_disk_are_refused(both, monkeypatch):
    task = both[0]
    rows = task.load().train
    monkeypatch.setattr(vision.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"the pixels of 12 images need about .* task\.cache_pixels=false writes none"):
        task.encode(rows, SMALL, training=True)
    assert not encoded_files()
    assert len(both[1].encode(rows, SMALL, training=True)) == 12


def test_the_size_of_the_pixels_is_known_before_they_are_written(both):
    rows = both[0].load().train
    pixels = sum(map(len, both[0].encode(rows, SMALL, training=True)["pixels"]))
    assert pixel_bytes(rows, SMALL) == pytest.approx(pixels, rel=0.15)


@pytest.mark.parametrize(
    "processor",
    [
        ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875),
        LevitImageProcessorPil(),
        PoolFormerImageProcessorPil(),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_processors_that_cut_off_a_margin_give_the_same_pixels(processor):
    y, x = np.mgrid[0:400, 0:600]
    colours = np.stack([x * 255 // 599, y * 255 // 399, (x + y) * 255 // 998], -1).astype(np.uint8)
    numbers = Preprocessing.of(processor, "a/model")
    small = shrink(Image.fromarray(colours), numbers.resize, numbers.resample)
    row = {"pixels": [small.tobytes()], "height": [small.height], "width": [small.width], "row": [0]}
    ours = ImageCollate(numbers, None)(row)["pixel_values"][0].numpy()
    theirs = np.asarray(processor(Image.fromarray(colours), return_tensors="np")["pixel_values"][0])
    np.testing.assert_allclose(ours, theirs, atol=0.02)
