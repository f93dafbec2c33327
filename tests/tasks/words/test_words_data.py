"""Rows of words and tags: CoNLL files, JSON lines, parquet; every fault with its file, row and column."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from omegaconf import OmegaConf

from diffora.errors import UserError
from diffora.tasks.base import get_task
from diffora.tasks.sources.records import Records
from diffora.tasks.words import read
from diffora.tasks.words.conll import read_conll

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def rows(n: int = 20) -> list[dict]:
    """Sentences with the columns tokens and ner_tags."""
    return [
        {"tokens": ["Anna", "Lee", f"lives{i}", "in", "Rome"], "ner_tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]}
        for i in range(n)
    ]


def write_lines(file: Path, content: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return file


def write_conll(file: Path, content: list[dict], form: str = "{word} {tag}") -> Path:
    sentences = (
        "\n".join(form.format(word=word, tag=tag) for word, tag in zip(row["tokens"], row["ner_tags"], strict=True))
        for row in content
    )
    file.write_text("\n\n".join(sentences) + "\n")
    return file


@pytest.fixture
def task(cfg):
    def make(path, *overrides):
        return get_task(cfg("task=tokens", f"task.path={path}", *overrides).task)

    return make


def problems_of(task) -> str:
    with pytest.raises(UserError) as caught:
        task.load()
    return "\n".join(caught.value.problems)


def notes_of(task) -> str:
    task.load()
    return "\n".join(note for account in task.accounts.values() for note in account.notes)


# --- formats ---


def test_all_formats_give_the_same_rows(task, tmp_path):
    content = rows()
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("string")), ner_tags=datasets.List(datasets.ClassLabel(names=NAMES))
    )
    numbered = [row | {"ner_tags": [NAMES.index(tag) for tag in row["ner_tags"]]} for row in content]
    datasets.Dataset.from_list(numbered, features=features).to_parquet(tmp_path / "a.parquet")
    write_lines(tmp_path / "b.jsonl", content)
    write_lines(tmp_path / "c.jsonl", numbered)
    write_conll(tmp_path / "d.conll", content)
    write_conll(tmp_path / "e.txt", content, "{word}\tNN\t{tag}")
    tags = f"task.tags=[{','.join(NAMES)}]"
    loaded = [task(tmp_path / name, tags).load() for name in ("a.parquet", "b.jsonl", "c.jsonl", "d.conll", "e.txt")]
    assert len({found.data_hash for found in loaded}) == 1
    assert len(loaded[0].train) == 18 and len(loaded[0].validation["validation"]) == 2
    assert loaded[0].train[0]["tags"] == [1, 2, 0, 0, 3] and loaded[0].train[0]["words"][:2] == ["Anna", "Lee"]
    assert list(task(tmp_path / "a.parquet").head()["id2label"].values()) == NAMES  # those of the features
    assert list(task(tmp_path / "b.jsonl").head()["id2label"].values()) == ["O", "B-LOC", "B-PER", "I-PER"]


def numbered_file(file: Path, names: list[str]) -> Path:
    """Rows whose tags are numbers, in the order of ``names``, which the file's features name."""
    content = [row | {"ner_tags": [NAMES.index(tag) for tag in row["ner_tags"]]} for row in rows()]
    turned = [row | {"ner_tags": [names.index(NAMES[tag]) for tag in row["ner_tags"]]} for row in content]
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("string")), ner_tags=datasets.List(datasets.ClassLabel(names=names))
    )
    file.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_list(turned, features=features).to_parquet(file)
    return file


def test_numbers_follow_the_names_of_their_own_file(task, tmp_path):
    """Also where the tags are known already: of a run that is evaluated on other rows, and of ``task.tags``."""
    turned = numbered_file(tmp_path / "turned.parquet", NAMES[::-1])
    expected = task(write_lines(tmp_path / "a.jsonl", rows()), f"task.tags=[{','.join(NAMES)}]").load_split("all")
    other = task(turned)
    other.expect(NAMES)
    assert other.load_split("all")["tags"][:] == expected["tags"][:]
    assert task(turned, f"task.tags=[{','.join(NAMES)}]").load_split("all")["tags"][:] == expected["tags"][:]
    folder = tmp_path / "folder"
    numbered_file(folder / "train.parquet", NAMES)
    numbered_file(folder / "test.parquet", NAMES[::-1])
    loaded = task(folder)
    loaded.load()
    assert loaded.load_split("test")["tags"][:] == expected["tags"][:]


def test_numbers_that_their_file_names_by_numbers_get_the_names_of_the_settings(task, tmp_path):
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("string")), ner_tags=datasets.List(datasets.ClassLabel(num_classes=5))
    )
    content = [row | {"ner_tags": [NAMES.index(tag) for tag in row["ner_tags"]]} for row in rows()]
    datasets.Dataset.from_list(content, features=features).to_parquet(tmp_path / "a.parquet")
    assert list(task(tmp_path / "a.parquet", f"task.tags=[{','.join(NAMES)}]").head()["id2label"].values()) == NAMES
    assert "1 is a number without a name" in problems_of(task(tmp_path / "a.parquet"))


def test_the_hash_depends_on_what_the_numbers_mean(task, tmp_path):
    one = write_lines(tmp_path / "a.jsonl", rows())
    swapped = {"B-LOC": "B-PER", "B-PER": "B-LOC", "I-PER": "I-LOC", "O": "O"}
    other = [row | {"ner_tags": [swapped[tag] for tag in row["ner_tags"]]} for row in rows()]
    tags = [f"task.tags=[O,{a}-PER,{b}-PER,{a}-LOC,{b}-LOC]" for a, b in (("B", "I"),)]
    hashes = {task(one, *tags).load().data_hash, task(write_lines(tmp_path / "b.jsonl", other), *tags).load().data_hash}
    assert len(hashes) == 2
    renumbered = task(one, "task.tags=[O,B-LOC,I-LOC,B-PER,I-PER]").load()
    assert renumbered.data_hash not in hashes


def test_a_conll_file_with_documents_comments_and_several_columns(task, tmp_path):
    text = (
        "-DOCSTART- -X- -X- O\r\n\r\n# id = 1\r\nAnna NNP B-NP B-PER\r\nsleeps VBZ B-VP O\r\n\r\n"
        "# id 7 x O-1\r\n# NN B-NP O\r\n1 CD I-NP O\r\n \t\r\n\r\nRome NNP B-NP B-LOC\r\n"
    )
    file = tmp_path / "a.conll"
    file.write_bytes(text.encode())
    made = task(file, "task.validation_fraction=0.4")
    found = made.load()
    words = sorted([*found.train["words"], *found.validation["validation"]["words"]])
    assert words == [["#", "1"], ["Anna", "sleeps"], ["Rome"]]  # a word may be a hash
    notes = notes_of(made)
    assert "2 lines of comments left out" in notes and "1 lines -DOCSTART- left out" in notes
    assert "columns of a.conll: tokens 1, ner_tags 4 of 4" in notes
    chunks = task(file, "task.tags_column=3", "task.validation_fraction=0.4")
    chunks.load()
    assert chunks.tagging.types == ("NP", "VP")
    assert "task.tags_column=7: its lines have 4 columns" in problems_of(task(file, "task.tags_column=7"))
    assert "words and tags are both in column 1" in problems_of(task(file, "task.tags_column=1"))


def test_words_may_have_spaces_in_a_file_with_tabs(task, tmp_path):
    write_conll(
        tmp_path / "a.txt",
        [{"tokens": ["New York", f"x{i}"], "ner_tags": ["S-LOC", "O"]} for i in range(4)],
        "{word}\t{tag}",
    )
    assert task(tmp_path / "a.txt").load().train["words"][0][0] == "New York"


def test_a_line_with_another_number_of_fields_is_refused(task, tmp_path):
    (tmp_path / "a.conll").write_text("Anna B-PER\nsleeps O\n\nRome\nx O\n")
    assert "a.conll cannot be read as .conll: line 4 has 1 fields, other lines have 2: Rome" in problems_of(
        task(tmp_path / "a.conll")
    )


def test_a_folder_with_its_own_splits_and_rows_without_tags(task, tmp_path):
    write_lines(tmp_path / "train.jsonl", rows())
    write_conll(tmp_path / "validation.conll", rows(4))
    (tmp_path / "test.txt").write_text("Anna\nsleeps\n\nRome\n")
    made = task(tmp_path)
    found = made.load()
    assert len(found.train) == 20 and len(found.validation["validation"]) == 4 and made.test_splits == ("test",)
    test = made.load_split("test")
    assert test.column_names == ["words", "number"] and test["words"][:] == [["Anna", "sleeps"], ["Rome"]]
    assert made.load_split("train").column_names == ["words", "tags", "number"]


def test_a_data_set_on_the_hub(task, tmp_path, monkeypatch):
    features = datasets.Features(
        words=datasets.List(datasets.Value("string")), tags=datasets.List(datasets.ClassLabel(names=NAMES))
    )
    content = [{"words": row["tokens"], "tags": [NAMES.index(tag) for tag in row["ner_tags"]]} for row in rows()]
    made = datasets.Dataset.from_list(content, features=features)
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return datasets.DatasetDict(train=made, validation=made.select(range(3)).flatten_indices(), test=made)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    hub = task("some/data", "task.subset=small", "task.tokens_column=words", "task.tags_column=tags")
    found = hub.load()
    assert asked == [("some/data", "small")] and len(found.train) == 20 and len(found.validation["validation"]) == 3
    assert list(hub.head()["id2label"].values()) == NAMES and hub.test_splits == ("test",)
    assert len(hub.load_split("test")) == 20
    with pytest.raises(UserError, match="some/data/small has no split 'dev'; it has train, validation, test"):
        hub.load_split("dev")


def test_equal_sentences_stay_together(task, tmp_path):
    content = [row for row in rows(10) for _ in range(2)]
    found = task(write_lines(tmp_path / "a.jsonl", content), "task.validation_fraction=0.4").load()
    assert not {row[2] for row in found.train["words"]} & {row[2] for row in found.validation["validation"]["words"]}


# --- notes ---


def test_the_scheme_and_the_number_of_entities_are_said(task, tmp_path):
    made = task(write_lines(tmp_path / "a.jsonl", rows()))
    assert "36 entities of 2 types in 90 words; IOB2 tags" in notes_of(made)
    plain = [row | {"ner_tags": ["PER", "PER", "O", "O", "LOC"]} for row in rows()]
    assert "36 entities of 2 types in 90 words; IO tags" in notes_of(task(write_lines(tmp_path / "b.jsonl", plain)))
    begins_with_i = [row | {"ner_tags": ["B-PER", "I-PER", "O", "O", "I-LOC"]} for row in rows()]
    assert "18 entities are not well-formed in IOB2" in notes_of(task(write_lines(tmp_path / "c.jsonl", begins_with_i)))
    speech = [row | {"ner_tags": ["N", "N", "V", "P", "N"]} for row in rows()]
    assert "no tag is O: if these are not entities, accuracy" in notes_of(
        task(write_lines(tmp_path / "d.jsonl", speech))
    )


def test_a_tag_that_no_training_word_has_is_said(task, tmp_path):
    made = task(write_lines(tmp_path / "a.jsonl", rows()), f"task.tags=[{','.join(NAMES)}]")
    assert "no word has these tags: I-LOC" in notes_of(made)


# --- faults ---


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ner_tags": ["O", "O"]}, "there are 2 tags for 5 words"),
        (
            {"ner_tags": ["O", "O", "O", "O", 3]},
            "3 is a number without a name: give the tags in their order, task.tags=",
        ),
        (
            {"ner_tags": ["O", "O", "O", "O", None]},
            "null is not a tag: it must be text or a whole number (word 5 of the row)",
        ),
        ({"ner_tags": ["O", "O", "O", "O", " "]}, '" " is an empty tag'),
        ({"ner_tags": "O O O O O"}, '"O O O O O" is not a list'),
        ({"tokens": None}, "null in place of a list; a sentence without words is []"),
        ({"tokens": ["a", "b", 3, "d", "e"]}, "3 is not text (word 3 of the row)"),
        (
            {"tokens": ["a", "b", "\ud800", "d", "e"]},
            "is not valid Unicode, or has a NUL character (word 3 of the row)",
        ),
    ],
)
def test_a_faulty_row_is_named(task, tmp_path, changed, message):
    content = rows()
    content[6] |= changed
    found = problems_of(task(write_lines(tmp_path / "a.jsonl", content)))
    column = next(iter(changed))
    assert f"a.jsonl, line 7, column '{column}': " in found and message in found


def test_all_kinds_of_faults_are_reported_at_once_with_their_number(task, tmp_path):
    content = rows()
    for i in (2, 3, 9):
        content[i]["ner_tags"] = ["O"]
    content[5]["tokens"] = [1, 2, "c", "d", "e"]
    found = problems_of(task(write_lines(tmp_path / "a.jsonl", content)))
    assert "line 3," in found and "(and 2 more such rows)" in found and "line 6," in found


@pytest.mark.parametrize("format", ["jsonl", "conll"])
def test_a_tag_that_training_does_not_have(task, tmp_path, format):
    write_lines(tmp_path / "train.jsonl", rows())
    strange = rows(4)
    strange[2]["ner_tags"] = ["B-PER", "I-PRE", "O", "O", "B-LOC"]
    write = write_lines if format == "jsonl" else write_conll
    write(tmp_path / f"validation.{format}", strange)
    found = problems_of(task(tmp_path))
    place = "line 3" if format == "jsonl" else "line 14"  # of CoNLL, the line of the word
    assert f"validation.{format}, {place}, column 'ner_tags': \"I-PRE\" is not a tag of the training rows" in found
    assert "O, B-LOC, B-PER, I-PER; perhaps 'I-PER' is meant" in found


def test_more_tags_than_training_has(task, tmp_path):
    write_lines(tmp_path / "train.jsonl", rows())
    more = [row | {"ner_tags": ["O", "O", "O", "B-LOC", "I-LOC"]} for row in rows(4)]
    write_lines(tmp_path / "validation.jsonl", more)
    assert "task.tags=[…] names more tags" in problems_of(task(tmp_path))
    assert task(tmp_path, f"task.tags=[{','.join(NAMES)}]").load().validation["validation"][0]["tags"] == [
        0,
        0,
        0,
        3,
        4,
    ]


def test_numbers_beyond_the_names(task, tmp_path):
    numbered = [row | {"ner_tags": [0, 0, 0, 0, 9]} for row in rows()]
    found = problems_of(task(write_lines(tmp_path / "a.jsonl", numbered), f"task.tags=[{','.join(NAMES)}]"))
    assert "9 is not the number of a tag; they are 0 to 4: O, B-PER" in found and "(and 19 more such rows)" in found


def test_other_mistakes(task, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", rows())
    assert "no column 'words' (task.tokens_column); it has tokens, ner_tags" in problems_of(
        task(file, "task.tokens_column=words")
    )
    assert "(task.tags_column); it has tokens, ner_tags; perhaps task.tags_column=ner_tags." in problems_of(
        task(file, "task.tags_column=tags")
    )
    one = write_lines(tmp_path / "b.jsonl", [row | {"ner_tags": ["O"] * 5} for row in rows()])
    assert "all words have the same tag" in problems_of(task(one))
    mixed = write_lines(tmp_path / "c.jsonl", [row | {"ner_tags": ["B-PER", "PER", "O", "O", "O"]} for row in rows()])
    assert "the tag 'PER' has no prefix, but 'B-PER' has one" in problems_of(task(mixed))
    (tmp_path / "d.jsonl").write_text('{"tokens": ["a"], "ner_tags": ["O"]}\n{"tokens": ["a"\n')
    assert "d.jsonl: line 2 is not JSON" in problems_of(task(tmp_path / "d.jsonl"))
    (tmp_path / "e.jsonl").write_text("\n")
    assert "e.jsonl: no rows." in problems_of(task(tmp_path / "e.jsonl"))
    assert "does not exist" in problems_of(task(tmp_path / "f.jsonl"))
    equal = write_lines(tmp_path / "g.jsonl", [rows()[0]] * 5)
    assert "all have the same input" in problems_of(task(equal))
    half = task(write_lines(tmp_path / "h.jsonl", [{"tokens": ["a"]}, rows()[0]]), "task.tags=[O,B-X]")
    with pytest.raises(UserError, match="the first row has none"):
        half.load_split("all")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.path=null"], "task=tokens reads your own rows: give a file (conll, txt, jsonl, parquet)"),
        (["task.path=a.xlsx"], "a file of one of the types conll, txt, jsonl, parquet; save the sheet as CSV UTF-8"),
        (["task.path=a.conll", "task.subset=x"], "task.subset=x: only a data set on the hub has subsets"),
        (["task.path=a.conll", "task.tags_column=tokens"], "is task.tokens_column too"),
        (["task.path=a.conll", "task.tags=[O,PER,B-PER]"], "task.tags: the tag 'PER' has no prefix"),
        (["task.path=a.conll", "task.tags=[O]"], "must be a list of tags, each once, or null"),
    ],
)
def test_impossible_settings(cfg, overrides, message):
    with pytest.raises(UserError) as caught:
        get_task(cfg("task=tokens", *overrides).task)
    assert message in str(caught.value)


@pytest.mark.parametrize("entities", [False, True])
def test_validation_rows_without_an_entity_are_noted(task, tmp_path, entities):
    write_lines(tmp_path / "train.jsonl", rows())
    plain = {"tokens": ["nobody", "is", "here"], "ner_tags": ["O", "O", "O"]}
    write_lines(tmp_path / "validation.jsonl", [plain, plain, *rows()[: int(entities)]])
    notes = notes_of(task(tmp_path))
    assert ("no entity, so F1 is 0 after every epoch" in notes) is not entities


def test_strict_needs_a_scheme_with_well_formed_entities(task, tmp_path):
    plain = [row | {"ner_tags": ["PER", "PER", "O", "O", "LOC"]} for row in rows()]
    file = write_lines(tmp_path / "a.jsonl", plain)
    assert "task.strict=true is for the schemes IOB2 and IOBES; the training rows have IO tags" in problems_of(
        task(file, "task.strict=true")
    )
    assert task(write_lines(tmp_path / "b.jsonl", rows()), "task.strict=true").load()


def test_the_recipe_is_complete(cfg):
    recipe = OmegaConf.to_container(cfg("task=tokens", "task.path=a.conll").task.recipe)
    assert recipe["rank"] and recipe["search_epochs"]


def test_other_rows_have_the_tags_of_the_run(task, tmp_path):
    made = task(write_lines(tmp_path / "new.jsonl", rows(4)))
    made.expect(["O", "B-PER", "I-PER"])
    with pytest.raises(UserError) as caught:
        made.load_split("all")
    place = "new.jsonl, line 1, column 'ner_tags'"
    what = '"B-LOC" is not a tag of the run: O, B-PER, I-PER (word 5 of the row) (and 3 more such rows).'
    assert f"{place}: {what}" in str(caught.value)
    with pytest.raises(UserError, match="the run was trained on other classes than tags of words"):
        made.expect(["O", "B-PER", "PER"])


def test_words_that_begin_with_a_hash_are_no_comments(tmp_path):
    file, notes = tmp_path / "a.conll", []
    file.write_text("# id = 1\n#brexit HT\nis VB\n\n# text\n# HT\n#eu HT\nbad JJ\n\n#new NN\n")
    found = read_conll(file, ("tokens", None), ("ner_tags", None), notes)
    assert [row["tokens"] for _, row in found.rows] == [["#brexit", "is"], ["#eu", "bad"], ["#new"]]
    assert notes == ["3 lines of comments left out"]


def test_lines_between_documents_and_parts_of_words_are_left_out(tmp_path):
    file, notes = tmp_path / "a.conll", []
    file.write_text("-DOCSTART- -X- O O\n\n1\tEl\tDET\n2-3\tdel\t_\n2\tde\tADP\n3\tel\tDET\n3.1\tx\t_\n")
    found = read_conll(file, ("tokens", 2), ("ner_tags", 3), notes)
    assert [row["tokens"] for _, row in found.rows] == [["El", "de", "el"]]
    assert notes[:2] == [
        "1 lines -DOCSTART- left out",
        "2 lines of words in several parts or of empty words left out (CoNLL-U)",
    ]
    file.write_text("1-2\tO\n3\tO\n")  # words, not numbers of words
    found = read_conll(file, ("tokens", None), ("ner_tags", None), [])
    assert [row["tokens"] for _, row in found.rows] == [["1-2", "3"]]


def test_a_tag_that_is_wrong_in_many_words_is_looked_up_once(monkeypatch):
    calls = []
    monkeypatch.setattr(read, "known_classes", lambda name, tags: calls.append(name))
    table = pa.table({"words": [["a"] * 50] * 40, "tags": [["x"] * 49 + ["y"]] * 40})
    files = [Records("a", ("tokens",), ())]
    part = read.WordsPart("a", table, numbers=list(range(40)), sources=[0] * 40, files=files)
    problems: list[str] = []
    read.tag_numbers(part, ["O"], "the run", "ner_tags", problems)
    assert sorted(calls) == ["x", "y"] and problems


def test_a_file_without_rows_is_said_to_have_none(task, tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    assert problems_of(task(tmp_path / "a.jsonl")) == f"{tmp_path / 'a.jsonl'}: no rows."
