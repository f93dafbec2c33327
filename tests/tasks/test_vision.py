"""Images from files to batches, compared with Pillow and transformers; faults, augmentation and the tiny ViT."""

import io
import itertools
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from diffora.backbones.load import load_backbone
from diffora.backbones.meta import meta_backbone
from diffora.core.grid import find_grid
from diffora.errors import UserError
from diffora.hub import EMBEDDED, resolve
from diffora.loop.data import FineTuneData, SearchData
from diffora.loop.splits import split_search
from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import run
from diffora.settings.read import model_of
from diffora.tasks.account import lines
from diffora.tasks.base import Split, get_task
from diffora.tasks.embedded.digits import ASKED, PRETRAINED, digits
from diffora.tasks.images import decode
from diffora.tasks.images import rows as image_rows
from diffora.tasks.images.batches import Augment, ImageCollate, centre, random_box
from diffora.tasks.images.preprocessing import Preprocessing
from diffora.tasks.images.source import IMAGE

TINY = EMBEDDED.parent / "tiny_vit"
SMALL = Preprocessing(resize=8, crop=8, resample=2, scale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_folders(folder: Path, train: int = 6, validation: int = 3) -> Path:
    """Write folders of two classes, with images of different sizes and formats."""
    for split, n in (("train", train), ("validation", validation)):
        for c, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                kind = ("png", "jpeg")[i % 2]
                content = encoded(picture(9 + i, 12 - i, seed=100 * c + i + 10 * len(split)), kind)
                (folder / split / name / f"{i}.{kind}").write_bytes(content)
    return folder


def to_parquet(folder: Path, target: Path, names: bool = True, **changes) -> Path:
    """The folder's splits as parquet in the hub's columns; ``changes`` replace columns of train."""
    target.mkdir()
    for split in ("train", "validation"):
        files = sorted((folder / split).rglob("*.*"))
        columns = {
            "image": pa.array([{"bytes": f.read_bytes(), "path": f.name} for f in files], IMAGE),
            "label": pa.array([("cat", "dog").index(f.parent.name) for f in files], pa.int64()),
        }
        if split == "train":
            columns = {name: column for name, column in (columns | changes).items() if column is not None}
        table = pa.table(columns)
        if names:
            features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
            info = {"info": {"features": datasets.Features(features).to_dict()}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pa.parquet.write_table(table, target / f"{split}-00000-of-00001.parquet")
    return target


@pytest.fixture
def folders(tmp_path) -> Path:
    return write_folders(tmp_path / "images")


@pytest.fixture
def task(cfg):
    """Makes the task of your own images."""

    def make(path: Path | None, *overrides: str):
        where = [] if path is None else [f"task.path={path}"]
        return get_task(cfg("task=imagefolder", "model=tiny_vit", *where, *overrides).task)

    return make


def problems(call, *args) -> list[str]:
    with pytest.raises(UserError) as caught:
        call(*args)
    return caught.value.problems


def pixels(task, rows, preprocessing: Preprocessing = SMALL) -> torch.Tensor:
    """The pixels of a split in evaluation."""
    found = task.encode(rows, preprocessing, training=False)
    return task.collate(preprocessing, training=False)(found[list(range(len(found)))])["pixel_values"]


def two_classes(folder, images) -> None:
    """Save the same images in two classes and two splits."""
    for split, kind in itertools.product(("train", "validation"), "ab"):
        (folder / split / kind).mkdir(parents=True)
        for name, image in images.items():
            image.save(folder / split / kind / name)


# --- the same pixels as elsewhere ---


@pytest.mark.parametrize("side", [40, 16, 9])  # larger than the model's images, as large, smaller
def test_square_images_get_the_pixels_of_vits_own_processor(tmp_path, task, side):
    image = picture(side, side)
    two_classes(tmp_path, {"x.png": image})
    theirs = ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    ours = pixels(t := task(tmp_path), t.load().train, Preprocessing.of(theirs, "x"))
    wanted = theirs([image, image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (20, 57)])
def test_other_images_are_resized_by_the_shorter_side_and_cropped_in_the_centre(tmp_path, task, size):
    image = picture(*size)
    two_classes(tmp_path, {"x.png": image})
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size={"height": 14, "width": 14})
    preprocessing = Preprocessing.of(theirs, "x")
    assert (preprocessing.resize, preprocessing.crop, preprocessing.resample) == (18, 14, Image.Resampling.BICUBIC)
    ours = pixels(t := task(tmp_path), t.load().train, preprocessing)
    wanted = theirs([image, image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


def test_a_small_image_is_enlarged_before_the_crop():
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size={"height": 14, "width": 14})
    image = picture(9, 12)
    box = centre(9, 12, Preprocessing.of(theirs, "x"))
    assert box == (2.5, 1.0, 9.5, 8.0)  # 7 of 9 pixels become 14 of 18
    batch = {"pixels": [image.tobytes()], "height": [9], "width": [12], "row": [0]}
    ours = ImageCollate(Preprocessing.of(theirs, "x"), None)(batch)["pixel_values"]
    difference = (ours - theirs(image, return_tensors="pt")["pixel_values"])[..., 2:-2, 2:-2]
    assert difference.abs().max() < 0.02  # not at the border, where the crop changes resizing


def test_sizes_of_image_processors():
    assert Preprocessing.of(AutoImageProcessor.from_pretrained(TINY), "x") == SMALL
    for size in ({"height": 8, "width": 9}, {"shortest_edge": 8, "longest_edge": 20}):
        processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
        processor.size = size
        if "width" in size:
            assert "must be the size of a square image" in problems(Preprocessing.of, processor, "here")[0]
        else:
            assert Preprocessing.of(processor, "here").resize == 8


def rgb(image: bytes) -> np.ndarray:
    return np.asarray(decode.decode({"bytes": image, "path": None}))


def test_every_kind_of_image_becomes_rgb():
    base = picture(4, 5)
    array, grey = np.asarray(base), np.asarray(base.convert("L"))
    as_grey = np.repeat(grey[..., None], 3, axis=2)
    alpha = Image.fromarray(np.dstack([array, np.arange(20, dtype=np.uint8).reshape(4, 5)]))
    assert np.array_equal(rgb(encoded(base)), array)
    assert np.array_equal(rgb(encoded(base.convert("L"))), as_grey)
    assert np.array_equal(rgb(encoded(alpha)), array)  # transparency dropped, colours kept
    assert np.array_equal(rgb(encoded(alpha.convert("LA"))), np.asarray(alpha.convert("LA").convert("RGB")))
    assert np.array_equal(rgb(encoded(Image.fromarray(grey > 99))), np.repeat((grey > 99)[..., None], 3, 2) * 255)
    palette = base.quantize(4)
    assert np.array_equal(rgb(encoded(palette)), np.asarray(palette.convert("RGB")))
    assert np.array_equal(
        rgb(encoded(palette, transparency=bytes([0, 9, 255, 30]))), np.asarray(palette.convert("RGB"))
    )
    cmyk = base.convert("CMYK")
    assert np.array_equal(rgb(encoded(cmyk, "tiff")), np.asarray(cmyk.convert("RGB")))
    for kind in ("png", "tiff"):
        deep = Image.fromarray((grey.astype(np.uint16) << 8) + 77)
        assert deep.mode == "I;16" and np.array_equal(rgb(encoded(deep, kind)), as_grey)
    assert rgb(encoded(picture(1, 1))).shape == (1, 1, 3)


def test_images_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    image = picture(4, 6)
    assert np.array_equal(rgb(encoded(image, "png", exif=exif)), np.rot90(np.asarray(image), -1))


def test_an_image_of_one_line_works(tmp_path, task):
    two_classes(tmp_path, {"long.png": picture(1, 300), "dot.png": picture(1, 1)})
    t = task(tmp_path)
    assert pixels(t, t.load().train).shape == (4, 3, 8, 8)


# --- sources ---


def test_folders_parquet_and_hub_give_the_same(folders, tmp_path, task, cfg, monkeypatch):
    local = task(folders)
    assert local.head() == {"num_labels": 2, "id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    rows = local.load()
    assert rows.train["label"][:] == [0] * 6 + [1] * 6 and len(rows.validation["validation"]) == 6
    parquet = to_parquet(folders, tmp_path / "parquet")
    table = task(parquet)
    with pytest.raises(UserError, match=r"task\.num_labels=null"):
        table.head()
    same = table.load()
    assert same.data_hash == rows.data_hash and table.head() == local.head()
    assert torch.equal(pixels(local, rows.train), pixels(table, same.train))

    calls = []

    def fake(*args):
        calls.append(args)
        files = {split: str(parquet / f"{split}-00000-of-00001.parquet") for split in ("train", "validation")}
        return {split: datasets.Dataset.from_parquet(file) for split, file in files.items()}

    monkeypatch.setattr("diffora.tasks.sources.hub.why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    hub = get_task(cfg("task=food101", "task.num_labels=2").task)
    assert hub.load().data_hash == rows.data_hash and calls == [("ethz/food101", None)]
    assert "has 2 classes" not in problems(get_task(cfg("task=food101").task).load)[0]
    assert problems(get_task(cfg("task=food101").task).load) == [
        "task.num_labels=101: the data have 2 classes: cat, dog"
    ]
    assert problems(hub.load_split, "test")[0].startswith("ethz/food101 has no split 'test'")


@pytest.mark.parametrize(("name", "n"), [("cifar100", 100), ("food101", 101)])
def test_hub_tasks_know_their_number_of_classes_without_data(cfg, name, n):
    assert get_task(cfg(f"task={name}", "model=vit_base").task).head() == {"num_labels": n}


def test_the_true_vit_has_its_grid_and_counts(cfg):
    c = cfg("task=cifar100", "model=vit_base")
    backbone = meta_backbone(model_of(c.model), get_task(c.task).model_request())
    grid = find_grid(backbone.model, c.model.layer, c.model.candidates, c.model.roles)
    assert (grid.n_layers, grid.n_types) == (12, 6) and grid.shapes[0][-1] == (3072, 768)
    assert backbone.n_parameters == 85_798_656 and backbone.count_parameters()["head"] == 76_900


def test_modules_named_from_the_model_itself(cfg):
    c = cfg("task=digits", "model=tiny_vit")
    model = meta_backbone(model_of(c.model), get_task(c.task).model_request()).model
    grid = find_grid(model, ".", ["classifier", "vit.layers.3.mlp.fc2"], c.model.roles)
    assert grid.names == (("classifier", "vit.layers.3.mlp.fc2"),) and grid.shapes == (((64, 5), (128, 64)),)
    found = problems(find_grid, model, ".", ["classifer"])
    assert found[0] == "classifer is not a linear layer of this model" and "classifier" in found[1]


def test_a_subset_of_the_training_images_is_always_the_same(folders, task):
    t = task(folders, "task.max_train_rows=5")
    first, second = t.load(), t.load()
    assert first.train["file"][:] == second.train["file"][:] and len(set(first.train["file"][:])) == 5
    assert first.data_hash == second.data_hash != task(folders).load().data_hash
    batch = t.collate(SMALL, False)(t.encode(first.train, SMALL, True)[[0, 1, 2, 3, 4]])
    assert batch["labels"].tolist() == first.train["label"][:] and batch["row"].tolist() == [0, 1, 2, 3, 4]


def test_the_hash_sees_a_changed_image_and_label(folders, task, tmp_path):
    before = task(folders).load().data_hash
    assert task(folders).load().data_hash == before
    file = folders / "train" / "cat" / "0.png"
    content = file.read_bytes()
    file.write_bytes(encoded(picture(9, 12, seed=99)))
    assert task(folders).load().data_hash != before
    file.write_bytes(content)  # at another time
    assert task(folders).load().data_hash == before
    file.rename(folders / "train" / "dog" / "zz.png")
    after = task(folders).load().data_hash
    assert after != before

    parquet = to_parquet(folders, tmp_path / "p")
    assert task(parquet).load().data_hash == after
    table = pa.parquet.read_table(split := parquet / "train-00000-of-00001.parquet")
    pa.parquet.write_table(table.set_column(1, table.field(1), pa.array([1, 0] * 6)), split)
    assert task(parquet).load().data_hash != after


def test_unlabelled_splits(folders, tmp_path, task):
    (folders / "test").mkdir()
    for i in range(3):
        shutil.copy(folders / "validation" / "dog" / f"{i}.{'png' if i % 2 == 0 else 'jpeg'}", folders / "test")
    t = task(folders)
    rows = t.load_split("test")
    assert "label" not in rows.column_names and len(rows) == 3 and t.classes == ["cat", "dog"]
    found = t.encode(rows, SMALL, training=False)
    batch = t.collate(SMALL, False)(found[[0, 1, 2]])
    assert "labels" not in batch
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    lines = t.predictions({"row": torch.arange(3), "logits": logits}, Split(rows, found))
    assert [(line["prediction"], line["class_number"]) for line in lines] == [("dog", 1), ("cat", 0), ("cat", 0)]
    assert lines[0]["file"] == str(folders / "test" / "0.png")
    assert lines[0]["probability"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert "label" in t.load_split("validation").column_names

    # -1 in every row says the same
    parquet = to_parquet(folders, tmp_path / "p")
    table = pa.parquet.read_table(parquet / "validation-00000-of-00001.parquet")
    none = table.set_column(1, table.field(1), pa.array([-1] * len(table), pa.int64()))
    pa.parquet.write_table(none, parquet / "test.parquet")
    assert "label" not in task(parquet).load_split("test").column_names


def test_score_counts_the_rows_given(folders, task):
    t = task(folders)
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 1])
    found = t.score({"row": torch.tensor([0, 3, 5]), "logits": logits, "labels": labels}, None)
    expected = -torch.log_softmax(logits, 1)[[0, 1, 2], labels].mean().item()
    assert found == pytest.approx({"loss": expected, "accuracy": 2 / 3})


# --- the cache ---


def test_a_second_run_decodes_nothing(folders, task, monkeypatch):
    t = task(folders)
    rows = t.load()
    first = pixels(t, rows.train)
    monkeypatch.setattr(decode, "decode", lambda image: pytest.fail("decoded again"))
    monkeypatch.setattr(image_rows, "_digest", lambda image: pytest.fail("read again"))
    again = task(folders)
    assert torch.equal(pixels(again, again.load().train), first)
    monkeypatch.undo()
    larger = Preprocessing(**{**SMALL.__dict__, "resize": 10})
    assert len(t.encode(rows.train, larger, True)) == 12
    heights, widths = (np.array(t.encode(rows.train, larger, True)[name]) for name in ("height", "width"))
    assert np.minimum(heights, widths).max() == 10 and np.minimum(heights, widths).min() < 10


def test_many_images_keep_their_order_across_chunks(tmp_path, task, monkeypatch):
    monkeypatch.setattr(decode, "IMAGES_AT_ONCE", 4)
    monkeypatch.setattr(image_rows, "IMAGES_AT_ONCE", 4)
    t = task(write_folders(tmp_path, train=7, validation=1))
    rows = t.load().train
    whole = pixels(t, rows)
    for i in (0, 3, 4, 9, 13):
        expected = decode.shrink(decode.decode(rows[i]["image"]), 8, 2)
        found = t.encode(rows, SMALL, True)[i]
        assert found["pixels"] == expected.tobytes() and found["row"] == i
    assert len(whole) == 14


# --- faults ---


def test_all_images_that_cannot_be_decoded_are_named(folders, task, monkeypatch):
    cat = folders / "train" / "cat"
    (cat / "0.png").write_bytes(b"no image")
    (cat / "1.jpeg").write_bytes((cat / "1.jpeg").read_bytes()[:-200])
    (cat / "2.png").write_bytes(b"")
    Image.fromarray(np.zeros((3, 3), np.float32)).save(cat / "f.tiff")
    t = task(folders)
    found = problems(t.encode, t.load().train, SMALL, True)
    assert [Path(line.split(": ")[0]).name for line in found] == ["0.png", "1.jpeg", "2.png", "f.tiff"]
    assert "no format that Pillow decodes" in found[0] and "runcated" in found[1]
    assert "nothing in place of an image" in found[2] and "floating-point" in found[3]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # 9 x 12 is more than twice that
    assert "is too large" in problems(t.encode, t.load().validation["validation"], SMALL, False)[0]
    monkeypatch.setattr(decode, "MOST_FAULTS", 2)
    assert problems(t.encode, t.load().train, SMALL, True)[-1].startswith("… and ")


def test_faults_in_tables_name_row_and_column(folders, tmp_path, task):
    good = pa.parquet.read_table(to_parquet(folders, tmp_path / "good") / "train-00000-of-00001.parquet")
    images = good.column("image").to_pylist()
    images[4], images[7] = None, {"bytes": b"?", "path": None}
    t = task(to_parquet(folders, tmp_path / "broken", image=pa.array(images, IMAGE)))
    found = problems(t.encode, t.load().train, SMALL, True)
    assert ["row 5 (data rows, counted from 1), column 'image'" in found[0], "row 8 " in found[1]] == [True, True]

    labels = [0, 1, 2, -1, None, 1, 0, 1, 0, 1, 0, 1]
    t = task(to_parquet(folders, tmp_path / "labels", label=pa.array(labels, pa.int64())))
    [message] = problems(t.load)
    assert "row 3 " in message and "label 2 is not one of 0 to 1 (and 2 more such rows)" in message

    t = task(to_parquet(folders, tmp_path / "types", image=pa.array(["a"] * 12), label=pa.array([0.5] * 12)))
    first, second = problems(t.load)
    assert "column 'image' holds string" in first and "column 'label' holds double" in second

    t = task(to_parquet(folders, tmp_path / "missing", names=False, label=None, labels=pa.array([0] * 12)))
    assert "; rename 'labels' if that is it" in problems(t.load)[0]
    t = task(to_parquet(folders, tmp_path / "one", names=False, label=pa.array([0] * 12)), "task.num_labels=2")
    assert problems(t.load)[0].endswith("has none: 1")
    raw = pa.array([image["bytes"] for image in good.column("image").to_pylist()])
    t = task(to_parquet(folders, tmp_path / "raw", names=False, image=raw), "task.num_labels=2")
    assert len(pixels(t, t.load().train)) == 12  # bytes alone will do


def test_faults_in_folders(folders, tmp_path, task):
    (folders / "train" / "bird").mkdir()
    (folders / "validation" / "fish").mkdir()
    shutil.copy(folders / "train" / "cat" / "0.png", folders / "validation" / "fish")
    first, second = problems(task(folders).load)
    assert "bird: no file has the extension of an image that Pillow can read; found nothing" in first
    assert "'fish' is not a class of the training images, which have bird, cat, dog" in second
    shutil.rmtree(folders / "validation")
    assert "nothing for the split 'validation'" in problems(task(folders).load)[1]
    (folders / "validation").mkdir()
    assert "no class folders" in problems(task(folders).load)[1]
    shutil.rmtree(folders / "train")
    assert "no folder 'train'" in problems(task(folders).load_split, "validation")[0]
    assert "does not exist" in problems(task(tmp_path / "nowhere").load)[0]
    assert "task.path=null" in problems(task, None)[0]
    (tmp_path / "p").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "p" / f"{split}.parquet").write_bytes(b"PAR1?")
    assert all("cannot be read as .parquet" in line for line in problems(task(tmp_path / "p").load))


# --- what is read, left out and numbered ---


def test_every_extension_that_pillow_decodes_is_read(folders, task):
    """B13: .jfif, extensions in capital letters, and rarer formats."""
    cat, content = folders / "train" / "cat", encoded(picture(9, 9, seed=5), "jpeg")
    for name in ("a.jfif", "b.JPE", "c.Jpg"):
        (cat / name).write_bytes(content)
    for name, kind in (("d.ico", "ico"), ("e.tga", "tga"), ("f.pcx", "pcx"), ("g.dib", "dib"), ("h.qoi", "qoi")):
        picture(16, 16, seed=6).save(cat / name, kind)
    t = task(folders)
    rows = t.load()
    assert len(rows.train) == 12 + 8 and len(pixels(t, rows.train)) == 20
    account = t.accounts["train"]
    assert (account.read, account.used, account.dropped) == (20, 20, {})


def test_files_that_are_not_images_are_counted(folders, task):
    """B13: files that are left out are reported."""
    cat, dog = folders / "train" / "cat", folders / "train" / "dog"
    for file in (
        cat / "Thumbs.db",
        cat / "a.txt",
        dog / "b.TXT",
        dog / ".hidden.png",
        dog / "README",
        folders / "train" / "x.csv",
    ):
        file.write_bytes(b"?")
    (cat / ".previews").mkdir()
    (folders / "train" / ".cache").mkdir()
    shutil.copy(cat / "0.png", folders / "train" / ".cache")
    picture(9, 9).save(cat / "page.eps")
    shutil.copy(cat / "0.png", cat / ".previews")
    t = task(folders)
    rows = t.load()
    account = t.account("train", Split(rows.train, t.encode(rows.train, SMALL, True)))
    assert len(rows.train) == 12 and (account.read, account.used) == (21, 12)
    assert account.dropped == {
        "no image: .db": 1,
        "no image: .txt": 2,
        "no image: README": 1,
        "no image: .csv": 1,
        "no image: .eps": 1,
        "hidden files": 3,
    }
    [line] = lines({"train": account.record()})
    assert line.startswith("train: 12 of 21 rows used; 3 left out (hidden files); 1 left out (no image: .db); ")


def test_folders_in_class_folders_are_read_also_with_links_and_loops(folders, task, tmp_path):
    cat = folders / "train" / "cat"
    (cat / "deep" / "er").mkdir(parents=True)
    shutil.move(cat / "0.png", cat / "deep" / "er" / "0.png")
    (cat / "folder.png").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.move(cat / "1.jpeg", tmp_path / "elsewhere")
    (cat / "link").symlink_to(tmp_path / "elsewhere")
    (cat / "deep" / "circle").symlink_to(cat)
    t = task(folders)
    names = [Path(file).name for file in t.load().train["file"][:]]
    assert sorted(names) == sorted([f"{i}.{('png', 'jpeg')[i % 2]}" for i in range(6)] * 2)


def test_no_program_is_started_for_an_image(folders, task, monkeypatch):
    """PostScript is a program. Pillow would pass it to Ghostscript, even with another file extension."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (folders / "train" / "cat" / "0.png").write_bytes(encoded(picture(9, 9), "eps"))
    t = task(folders)
    [message] = problems(t.encode, t.load().train, SMALL, True)
    assert "0.png: cannot be decoded: it is in no format that Pillow decodes" in message


def test_links_to_nothing_are_named(folders, task):
    link = folders / "train" / "cat" / "z.png"
    link.symlink_to(folders / "gone.png")
    assert problems(task(folders).load) == [f"{link}: a link to a file that does not exist."]


def test_images_beside_the_class_folders_are_refused(folders, task):
    shutil.copy(folders / "train" / "cat" / "0.png", folders / "train" / "lost.png")
    [message] = problems(task(folders).load)
    assert message == f"{folders / 'train'}: images beside the class folders, where they have no class: lost.png."


def test_a_single_class_is_refused(folders, task):
    for split in ("train", "validation"):
        shutil.rmtree(folders / split / "dog")
    [message] = problems(task(folders).load)
    assert message.endswith("all images are of the class 'cat'; two are needed")


def test_the_first_of_several_frames_is_used_with_a_note(folders, task):
    frames = [picture(9, 9, seed=i) for i in range(3)]
    for name, kind in (("x.gif", "gif"), ("x.tiff", "tiff"), ("x.webp", "webp")):
        frames[0].save(folders / "train" / "cat" / name, kind, save_all=True, append_images=frames[1:])
    t = task(folders)
    rows = t.load()
    account = t.account("train", Split(rows.train, t.encode(rows.train, SMALL, True)))
    assert account.changed == {"the first of several frames is used": 3} and account.used == 15
    tiff = t.encode(rows.train, SMALL, True)[[Path(file).name for file in rows.train["file"][:]].index("x.tiff")]
    assert tiff["pixels"] == decode.shrink(frames[0], 8, 2).tobytes() and tiff["cut"]


def turned(folder: Path, split: str, names: list[str], labels: list) -> None:
    """Give a split of `to_parquet` other labels and class names. None leaves the labels as they are."""
    file = folder / f"{split}-00000-of-00001.parquet"
    table = pa.parquet.read_table(file)
    table = table.set_column(1, "label", pa.array(labels))
    if names:
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        info = {"info": {"features": datasets.Features(features).to_dict()}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    else:
        table = table.replace_schema_metadata(None)
    pa.parquet.write_table(table, file)


def test_numbers_follow_names_between_splits(folders, tmp_path, task):
    """B4 for images: another order, fewer names, names as labels."""
    expected = task(folders).load().data_hash
    parquet = to_parquet(folders, tmp_path / "p")
    turned(parquet, "validation", ["dog", "cat"], [1] * 3 + [0] * 3)
    t = task(parquet)
    assert t.load().data_hash == expected
    assert list(t.accounts["validation"].changed.values()) == [6]
    turned(parquet, "train", [], ["cat"] * 6 + ["dog"] * 6)
    assert task(parquet).load().data_hash == expected
    turned(parquet, "validation", [], ["cat"] * 3 + ["dog"] * 3)
    t = task(parquet)
    assert t.load().data_hash == expected and t.classes == ["cat", "dog"]
    turned(parquet, "validation", [], ["dog"] * 6)
    assert task(parquet).load_split("validation")["label"][:] == [1] * 6  # as train numbers them


def test_names_that_the_training_split_lacks_are_refused(folders, tmp_path, task):
    parquet = to_parquet(folders, tmp_path / "p")
    turned(parquet, "validation", ["cat", "Dog"], [0] * 3 + [1] * 3)
    [message] = problems(task(parquet).load)
    assert "its classes are cat, Dog; " in message and "has cat, dog; rename 'Dog' if 'dog' is meant" in message
    turned(parquet, "validation", [], [0] * 3 + [1] * 3)
    turned(parquet, "train", [], ["cat"] * 6 + ["dog"] * 6)
    assert "has class names as labels" in problems(task(parquet).load)[0]


def test_class_numbers_come_from_the_trained_model(folders, tmp_path, task):
    parquet = to_parquet(folders, tmp_path / "p")
    t = task(parquet)
    t.expect(["dog", "bird", "cat"])
    assert t.load_split("validation")["label"][:] == [2] * 3 + [0] * 3 and t.head()["num_labels"] == 3
    turned(parquet, "validation", ["0", "1"], [0] * 3 + [1] * 3)  # names like others: digits, for instance
    assert "its classes are 0, 1; the run's are dog, bird, cat" in problems(t.load_split, "validation")[0]
    turned(parquet, "validation", ["cat", "dog"], [0] * 3 + [1] * 3)
    t.expect(["dog", "bird"])
    assert "its classes are cat, dog; the run's are dog, bird" in problems(t.load_split, "validation")[0]


def test_a_trained_model_needs_no_training_images_to_see_others(folders, task):
    shutil.rmtree(folders / "train")
    (folders / "test").mkdir()
    shutil.copy(folders / "validation" / "dog" / "0.png", folders / "test")
    t = task(folders)
    t.expect(["dog", "bird", "cat"])
    assert t.load_split("validation")["label"][:] == [2] * 3 + [0] * 3 and t.head()["num_labels"] == 3
    assert "label" not in t.load_split("test").column_names and t.classes == ["dog", "bird", "cat"]
    t.expect(["cat", "cow"])
    assert "'dog' is not a class of the training images, which have cat, cow" in problems(t.load_split, "validation")[0]


def test_a_later_split_is_numbered_as_the_first_was(folders, tmp_path, task):
    parquet = to_parquet(folders, tmp_path / "p")
    shutil.copy(parquet / "validation-00000-of-00001.parquet", parquet / "test-00000-of-00001.parquet")
    turned(parquet, "test", ["dog", "cat"], [1] * 3 + [0] * 3)
    t = task(parquet)
    t.load()
    assert t.load_split("test")["label"][:] == [0] * 3 + [1] * 3 and t.classes == ["cat", "dog"]


def test_doubtful_data_give_notes(folders, task):
    shutil.rmtree(folders / "validation" / "dog")
    shutil.copy(folders / "train" / "cat" / "0.png", folders / "validation" / "cat" / "again.png")
    t = task(folders)
    t.load()
    assert t.accounts["validation"].notes == [
        "no image of these classes: dog",
        "all images are of the same class: cat",
        "1 of 4 rows are training rows too: the score may be too high",
    ]
    t = task(folders, "task.max_train_rows=1")
    t.load()
    assert t.accounts["train"].dropped == {"task.max_train_rows=1": 11}
    assert t.accounts["train"].notes[0].startswith("all images are of the same class: ")


def test_shards_of_images_are_complete_and_of_one_set(folders, tmp_path, task):
    parquet = to_parquet(folders, tmp_path / "p")
    file = parquet / "train-00000-of-00001.parquet"
    shutil.copy(file, parquet / "train-00000-of-00002.parquet")
    assert "more than one file or set of shards for the split 'train'" in problems(task(parquet).load)[0]
    file.unlink()
    assert "shards of the split 'train' are missing: train-00001-of-00002.parquet" in problems(task(parquet).load)[0]


# --- augmentation ---


def cached_rows(n: int, seed: int = 0) -> dict[str, list]:
    sizes = [(9 + i % 3, 12 - i % 4) for i in range(n)]
    return {
        "pixels": [picture(h, w, seed + i).tobytes() for i, (h, w) in enumerate(sizes)],
        "height": [h for h, _ in sizes],
        "width": [w for _, w in sizes],
        "row": list(range(n)),
    }


def taken(rows: dict[str, list], which: list[int], draw: tuple[int, ...]) -> dict:
    return {name: [values[i] for i in which] for name, values in rows.items()} | {"draw": draw}


AUGMENT = Augment(crop_area=0.2, flip=True, shift=0.125)


def test_augmentation_depends_on_draw_and_row_alone():
    rows, collate = cached_rows(6), ImageCollate(SMALL, AUGMENT)
    whole = collate(taken(rows, [0, 1, 2, 3, 4, 5], (7, 2, 0)))["pixel_values"]
    np.random.seed(1)
    torch.manual_seed(1)
    other = ImageCollate(SMALL, AUGMENT)(taken(rows, [4, 1], (7, 2, 0)))["pixel_values"]
    assert torch.equal(other, whole[[4, 1]])
    for draw in ((8, 2, 0), (7, 3, 0), (7, 2, 1)):
        assert not torch.equal(collate(taken(rows, [4, 1], draw))["pixel_values"], other)
    with pytest.raises(KeyError):
        collate({name: values for name, values in rows.items() if name != "draw"})


def test_shifts_move_by_whole_pixels_and_never_flip():
    image = picture(8, 8)
    rows = {"pixels": [image.tobytes()], "height": [8], "width": [8], "row": [3]}
    padded = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)))
    moves = {(d, r): padded[1 - d : 9 - d, 1 - r : 9 - r] for d in (-1, 0, 1) for r in (-1, 0, 1)}
    seen = set()
    collate = ImageCollate(SMALL, Augment(crop_area=None, flip=False, shift=0.125))
    for epoch in range(80):
        found = collate({**rows, "draw": (0, 2, epoch)})["pixel_values"][0]
        found = np.rint((found.permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)
        seen.add(next(move for move, expected in moves.items() if np.array_equal(expected, found)))
    assert len(seen) == 9


def test_flips_come_in_half_of_the_cases():
    image = picture(8, 8)
    rows = {"pixels": [image.tobytes()], "height": [8], "width": [8], "row": [3]}
    plain = ImageCollate(SMALL, None)(rows)["pixel_values"]
    collate = ImageCollate(SMALL, Augment(crop_area=None, flip=True, shift=0.0))
    flipped = 0
    for epoch in range(200):
        found = collate({**rows, "draw": (0, 2, epoch)})["pixel_values"]
        assert torch.equal(found, plain) or torch.equal(found, plain.flip(3))
        flipped += int(torch.equal(found, plain.flip(3)))
    assert 70 < flipped < 130


def test_random_boxes_lie_inside_and_are_of_the_shares_asked_for():
    rng = np.random.default_rng(0)
    shares = []
    for height, width, least in [(224, 224, 0.08), (224, 300, 0.5), (30, 200, 0.9), (1, 1, 0.08), (5, 400, 0.3)]:
        for _ in range(200):
            left, top, right, bottom = random_box(height, width, least, rng)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            w, h = right - left, bottom - top
            assert 0.74 < w / h < 1.34
            share = w * h / (width * height)
            if height == width == 224:
                shares.append(share)
            elif (height, width) == (224, 300):
                assert share >= 0.5 - 1e-9
    assert min(shares) >= 0.08 and 0.08 < np.quantile(shares, 0.05) < 0.15 and np.quantile(shares, 0.95) > 0.8


def batches(data, epoch: int) -> list:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_workers_and_epochs_give_the_same_batches(folders, task):
    t = task(folders, "task.augment.crop_area=0.3", "task.augment.shift=0.2")
    train = t.encode(t.load().train, SMALL, True)
    collate = t.collate(SMALL, training=True), t.collate(SMALL, training=False)
    seen = {}
    for workers in (0, 2):
        data = FineTuneData(train, {}, collate, 4, 4, seed=3, num_workers=workers)
        seen[workers] = [batches(data, epoch) for epoch in (0, 1)]
    by_row = [torch.cat([b["pixel_values"] for b in e])[torch.cat([b["row"] for b in e]).argsort()] for e in seen[0]]
    assert not torch.equal(*by_row)  # another epoch, another look
    for one, two in zip(itertools.chain(*seen[0]), itertools.chain(*seen[2]), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_search_valid_images_are_not_augmented(folders, task):
    t = task(folders)
    train = t.encode(t.load().train, SMALL, True)
    plain = t.collate(SMALL, training=False)
    split = split_search(np.arange(len(train)), seed=0)
    data = SearchData(train, (t.collate(SMALL, training=True), plain), split, 3, seed=0)
    for item in batches(data, 1):
        rows = item["valid"]["row"].tolist()
        assert torch.equal(item["valid"]["pixel_values"], plain(train[rows])["pixel_values"])
        for batch in item["train"]:
            rows = batch["row"].tolist()
            assert not torch.equal(batch["pixel_values"], plain(train[rows])["pixel_values"])


# --- the embedded task and backbone ---


@pytest.fixture
def digit_task(cfg):
    return get_task(cfg("task=digits", "model=tiny_vit").task)


def test_the_embedded_task_has_no_image_of_the_pretraining(digit_task):
    rows = digit_task.load()
    splits = [rows.train, rows.validation["validation"]]
    content = [{image["bytes"][-64:] for image in split["image"]} for split in splits]
    pretraining = {image.tobytes() for image in digits(PRETRAINED)[0]}
    assert [len(c) for c in content] == [536, 360] and len(pretraining) == 901
    assert not content[0] & content[1] and not (content[0] | content[1]) & pretraining
    images, targets = digits(ASKED)
    by_content = {image.tobytes(): target for image, target in zip(images, targets, strict=True)}
    assert content[0] | content[1] == set(by_content)
    assert all(by_content[r["image"]["bytes"][-64:]] == int(digit_task.classes[r["label"]]) for r in rows.train)
    counts = [np.bincount(split["label"][:], minlength=5) for split in splits]
    assert all(count.min() > 60 for count in counts)


def test_digits_keep_their_pixels(digit_task):
    rows = digit_task.load().train
    found = (pixels(digit_task, rows)[5, 0] + 1) * 8
    assert found.shape == (8, 8)
    sixteenths = torch.frombuffer(bytearray(rows[5]["image"]["bytes"][-64:]), dtype=torch.uint8).view(8, 8) / 255 * 16
    torch.testing.assert_close(found, sixteenths, atol=1e-4, rtol=0)


def test_the_embedded_task_says_what_it_has(cfg, digit_task):
    assert problems(digit_task.load_split, "test") == ["split=test: task 'digits' has the splits train, validation."]
    assert len(digit_task.load_split("validation")) == 360
    many = get_task(cfg("task=digits", "task.validation_rows=896").task)
    assert problems(many.load)[0].startswith("task.validation_rows=896 must be less than 896, the number of images")


def test_tiny_vit_is_small_and_lacks_only_the_classifier():
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 1.5 * 2**20
    model, info = AutoModelForImageClassification.from_pretrained(TINY, num_labels=5, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    with pytest.raises(UserError, match=r"these do: .*embedded:tiny_vit"):
        resolve("embedded:huge_vit")


def neighbours_agree(model, which) -> float:
    """How often the image with the most similar features shows the same digit."""
    images, targets = digits(which)
    pixel_values = (torch.from_numpy(images).float() / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
    with torch.no_grad():
        features = torch.nn.functional.normalize(model(pixel_values).last_hidden_state[:, 0], dim=1)
    nearest = (features @ features.T - 2 * torch.eye(len(features))).argmax(1)
    return float((targets[nearest] == targets).mean())


def test_tiny_vit_has_learned_the_digits_that_it_was_shown():
    model = AutoModelForImageClassification.from_pretrained(TINY, num_labels=5).vit.eval()
    torch.manual_seed(0)
    untrained = type(model)(model.config, add_pooling_layer=False).eval()
    assert neighbours_agree(model, PRETRAINED) > 0.98 > neighbours_agree(untrained, PRETRAINED)


# --- whole runs ---

QUICK = [
    "task=digits",
    "model=tiny_vit",
    "trainer=cpu",
    "logger=csv",
    "task.max_train_rows=128",
    "finetune.epochs=2",
    "finetune.warmup_steps=2",
]


def logits_of(model, task) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(pixel_values=pixels(task, task.load_split("validation"))).logits


def test_a_stopped_run_resumes_to_the_same_end(cfg, tmp_path, monkeypatch):
    from diffora.training.finetune import FineTuneModule

    overrides = [*QUICK, "search.epochs=1"]
    whole = run(cfg(*overrides), tmp_path / "whole")
    step = FineTuneModule.training_step

    def stop(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 2:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuneModule, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(cfg(*overrides), tmp_path / "stopped")
    resumed = run(cfg(*overrides, "resume=true"), tmp_path / "stopped")
    for key in ("metrics", "history", "selection", "data_hash"):
        assert resumed.record[key] == whole.record[key], key


def test_the_adapter_loads_with_plain_peft(cfg, tmp_path):
    from peft import PeftModel

    c = cfg(*QUICK, "method=lora")
    result = run(c, tmp_path / "run")
    base = AutoModelForImageClassification.from_pretrained(TINY, num_labels=5)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    task = get_task(c.task)
    torch.testing.assert_close(logits_of(loaded, task), logits_of(result.model, task), atol=1e-5, rtol=1e-5)


def test_adapting_only_the_classifier_with_its_weight_frozen(cfg, tmp_path):
    """A small version of RM-LoRA's Figure 1, with the measures of its Table 5."""
    from peft import PeftModel

    from diffora.api import load_adapter

    alone = ["task.train_head=false", "model.layer=.", "model.candidates=[classifier]"]
    rank = 3
    c = cfg(*QUICK, "method=rm_lora", f"rank={rank}", *alone)
    result = run(c, tmp_path / "run")
    params, metrics, task = result.record["params"], result.record["metrics"], get_task(c.task)
    assert params["adapter"] == params["trainable"] == rank * (64 + 5) and params["head"] == 0

    torch.manual_seed(c.seed)
    drawn = load_backbone(model_of(c.model), task.model_request()).model
    layer = result.model.classifier
    assert all(torch.equal(p, drawn.vit.get_parameter(name)) for name, p in result.model.vit.named_parameters())
    best = (layer.lora_bt.T @ layer.lora_a * layer.scaling).detach().double()
    values = torch.linalg.svdvals(best)
    assert metrics["update/rank"] == torch.linalg.matrix_rank(best, rtol=64 * 1.2e-7) <= rank
    gram = best @ best.T - torch.eye(5)
    assert metrics["update/orthogonality_loss"] == pytest.approx(gram.square().sum().item(), rel=1e-4)
    assert values[0] > 0

    want = logits_of(result.model, task)
    for load in (PeftModel.from_pretrained, lambda base, folder: load_adapter(base, Path(folder)) or base):
        torch.manual_seed(99)  # the head gets other random weights, which loading must replace
        base = AutoModelForImageClassification.from_pretrained(TINY, num_labels=5)
        loaded = load(base, str(tmp_path / "run" / "adapter")).eval()
        torch.testing.assert_close(logits_of(loaded, task), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dry", ["true", "false"])
def test_training_and_adapting_the_head_at_once_is_refused(cfg, tmp_path, dry):
    """Before, the run was completed, but its adapter could not be loaded."""
    alone = ["model.layer=.", "model.candidates=[classifier]", f"dry_run={dry}"]
    with pytest.raises(UserError, match=r"classifier is part of the head, .*task\.train_head=false"):
        run(cfg(*QUICK, "method=lora", *alone), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_trained_head_and_no_adapter_is_refused(cfg, tmp_path):
    with pytest.raises(UserError, match="nothing"):
        run(cfg(*QUICK, "method=head_only", "task.train_head=false"), tmp_path / "run")


@pytest.mark.parametrize("second", [["dog", "cat"], ["cat", "dog", "eel"], None])
def test_shards_that_number_their_classes_in_other_ways_are_refused(folders, tmp_path, task, second):
    """B4 between the files of one split: `datasets` uses the class names of one file for all."""
    place = to_parquet(folders, tmp_path / "tables")
    whole = pa.parquet.read_table(place / "train-00000-of-00001.parquet")
    (place / "train-00000-of-00001.parquet").unlink()
    for i, names in enumerate((["cat", "dog"], second)):
        label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
        info = {"info": {"features": datasets.Features({"image": datasets.Image(), "label": label}).to_dict()}}
        shard = whole.slice(6 * i, 6).replace_schema_metadata({"huggingface": json.dumps(info)})
        pa.parquet.write_table(shard, place / f"train-0000{i}-of-00002.parquet")
    [message] = problems(task(place).load)
    assert "train-00001-of-00002.parquet: column 'label': its classes are" in message


def test_a_split_that_exists_twice_is_refused(folders, tmp_path, task):
    place = to_parquet(folders, tmp_path / "tables")
    shutil.copy(place / "train-00000-of-00001.parquet", folders / "train.parquet")
    assert "the split 'train' is there as a folder and as .parquet" in problems(task(folders).load)[0]
    (place / "data").mkdir()
    shutil.copy(place / "train-00000-of-00001.parquet", place / "data" / "train.parquet")
    assert "and in" in problems(task(place).load)[0]


def test_a_replaced_file_with_the_same_name_and_time_is_read_again(folders, tmp_path, task):
    file = to_parquet(folders, tmp_path / "tables") / "train-00000-of-00001.parquet"
    before, stat = task(file.parent).load().train["label"][:], file.stat()
    table = pa.parquet.read_table(file)
    pa.parquet.write_table(table.take(list(range(len(table)))[::-1]), file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert task(file.parent).load().train["label"][:] == before[::-1]


def test_a_folder_whose_name_looks_like_a_pattern(folders, tmp_path, task):
    place = to_parquet(folders, tmp_path / "images [1] of *")
    assert len(task(None, f"task.path='{place}'").load().train) == 12


def test_an_image_beside_its_table_is_read_again_after_a_change(folders, tmp_path, task):
    """A table may have paths in place of bytes; its own file does not change with them."""
    files = sorted((folders / "train").rglob("*.*"))
    paths = pa.array([{"bytes": None, "path": str(file)} for file in files], IMAGE)
    place = to_parquet(folders, tmp_path / "tables", image=paths)
    before = pixels(task(place), task(place).load().train)
    shutil.copy(files[2], files[0])
    after = pixels(task(place), task(place).load().train)
    assert after[0].equal(before[2]) and after[1:].equal(before[1:])


def test_bytes_of_any_arrow_type(folders, tmp_path, task):
    files = sorted((folders / "train").rglob("*.*"))
    content = pa.array([file.read_bytes() for file in files], pa.large_binary())
    place = to_parquet(folders, tmp_path / "tables", names=False, image=content)
    rows = task(place, "task.num_labels=2").load().train
    assert rows["digest"][:] == task(folders).load().train["digest"][:]


def test_classes_that_differ_only_in_case_are_noted(folders, task):
    for split in ("train", "validation"):
        shutil.copytree(folders / split / "cat", folders / split / "Cat")
    made = task(folders)
    made.load()
    said = "classes whose names differ only in case, white space or invisible characters: Cat, cat"
    assert said in made.accounts["train"].notes


def test_an_empty_name_is_not_a_class(folders, tmp_path, task):
    labels = pa.array(["cat", "", " ", *["dog"] * 9])
    place = to_parquet(folders, tmp_path / "tables", names=False, label=labels)
    validation = pa.parquet.read_table(place / "validation-00000-of-00001.parquet")
    named = validation.set_column(1, "label", pa.array(["cat", "dog"] * 3))
    pa.parquet.write_table(named, place / "validation-00000-of-00001.parquet")
    [message] = problems(task(place).load)
    assert "row 2" in message and "its label null is not one of 0 to 1 (and 1 more such row)" in message


def test_numbers_without_names_count_as_the_runs_with_a_note(folders, tmp_path, task):
    made = task(to_parquet(folders, tmp_path / "tables", names=False))
    made.expect(["dog", "cat"])
    made.load_split("validation")
    [note] = made.accounts["validation"].notes
    assert note == "it does not name its classes: its numbers are taken to mean those of the run: dog, cat"


def test_a_run_on_tables_is_evaluated_by_the_names_of_its_classes(folders, tmp_path, cfg):
    """B4 with `evaluate.py`: only the tables have the names, and other tables may number them differently."""
    place = to_parquet(folders, tmp_path / "tables")
    overrides = ["experiment=quickstart", "method=lora", "task=imagefolder", "model=tiny_vit", f"task.path={place}"]
    run(cfg(*overrides, "finetune.epochs=1", "finetune.warmup_steps=1", "logger=csv"), tmp_path / "run")
    other = tmp_path / "other"
    other.mkdir()
    file = "validation-00000-of-00001.parquet"
    table = pa.parquet.read_table(place / file)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
    info = json.dumps({"info": {"features": datasets.Features(features).to_dict()}})
    turned = table.set_column(1, "label", pa.array([1 - label for label in table["label"].to_pylist()]))
    pa.parquet.write_table(turned.replace_schema_metadata({"huggingface": info}), other / file)
    found = [
        evaluate(read_request([f"run={tmp_path / 'run'}", f"task.path={path}", f"output={tmp_path / path.name}-out"]))
        for path in (place, other)
    ]
    assert found[0] == found[1] and "accuracy" in found[0]["validation"]
    lines = [(tmp_path / f"{path.name}-out" / "validation.jsonl").read_text() for path in (place, other)]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 6


def test_unsigned_labels_are_read_in_every_split(task, folders, tmp_path):
    """numpy's usual type for labels; -1, the mark for no label, is not among its numbers."""
    made = to_parquet(folders, tmp_path / "parquet")
    for file in made.rglob("*.parquet"):
        table = pa.parquet.read_table(file)
        labels = table.column("label").cast(pa.uint8())
        pa.parquet.write_table(table.set_column(table.column_names.index("label"), "label", labels), file)
    validation = next(made.rglob("validation*.parquet"))
    shutil.copy(validation, validation.with_name(validation.name.replace("validation", "test")))
    found = task(made, "task.num_labels=2").load_split("test")
    assert found["label"] == task(folders).load_split("validation")["label"]
