import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.data import in_memory, records, synthetic


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def inputs(found):
    return [record["input"] for _, record in found]


def numbered(*numbers):
    return [{"input": str(n), "output": "x"} for n in numbers]


def test_a_folder_of_folders(tmp_path):
    write(tmp_path / "train" / "b.jsonl", *numbered(3, 4))
    write(tmp_path / "train" / "a.jsonl", *numbered(1, 2))
    write(tmp_path / "val" / "a.jsonl", *numbered(5))
    write(tmp_path / "test" / "a.jsonl", {"input": "6"})
    assert inputs(records(tmp_path)) == ["1", "2", "3", "4"], "nothing held out of it"
    assert inputs(records(str(tmp_path), "validation")) == ["5"]
    assert inputs(records(tmp_path, "test")) == ["6"]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_folder_of_files(tmp_path, name):
    write(tmp_path / "train.jsonl", *numbered(1))
    write(tmp_path / f"{name}.jsonl", *numbered(2))
    write(tmp_path / "notes.jsonl", *numbered(3))
    assert inputs(records(tmp_path)) == ["1"]
    assert inputs(records(tmp_path, "validation")) == ["2"]
    with pytest.raises(ValueError, match=r"has no test split: it has train and validation. Add"):
        records(tmp_path, "test")


def test_files_without_splits_are_for_training(tmp_path):
    write(tmp_path / "b.jsonl", *numbered(2))
    write(tmp_path / "a.jsonl", *numbered(1))
    nothing_held_out = {"validation_fraction": 0}
    assert inputs(records(tmp_path, **nothing_held_out)) == ["1", "2"]
    assert inputs(records(tmp_path / "b.jsonl", **nothing_held_out)) == ["2"]
    files = [tmp_path / "b.jsonl", str(tmp_path / "a.jsonl")]
    assert inputs(records(files, **nothing_held_out)) == ["2", "1"], "in their order"
    with pytest.raises(ValueError, match=r"no validation split.*validation_fraction be above 0"):
        records(tmp_path, "validation", **nothing_held_out)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2), st.sampled_from([None, 0.05, 0.5, 0.95]))
def test_what_is_held_out_is_never_trained_on(tmp_path_factory, numbers, fraction):
    path = tmp_path_factory.mktemp("data") / "all.jsonl"
    write(path, *numbered(*numbers))
    train = inputs(records(path, validation_fraction=fraction))
    held_out = inputs(records(path, "validation", validation_fraction=fraction))
    assert not set(train) & set(held_out), "equal records are on one side"
    assert sorted(train + held_out) == sorted(map(str, numbers))
    if len(set(numbers)) > 1:
        assert train and held_out


def test_about_the_fraction_is_held_out_and_more_records_move_none(tmp_path):
    write(tmp_path / "few.jsonl", *numbered(*range(500)))
    write(tmp_path / "many.jsonl", *numbered(*range(1000)))
    few, many = (inputs(records(tmp_path / f"{n}.jsonl", "validation")) for n in ("few", "many"))
    assert 30 < len(many) < 70 and set(few) < set(many)


def test_every_kind_of_file_makes_splits(tmp_path):
    import gzip

    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train" / "a.json").write_text(json.dumps(numbered(1, 2)))
    (tmp_path / "train" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"input": "3"}'))
    (tmp_path / "train" / "c.csv").write_text("input,output\n4,x\n")
    (tmp_path / "train" / "._a.json").write_bytes(b"\0\0")
    write(tmp_path / "val" / "a.jsonl", *numbered(5))
    (tmp_path / "val" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"input": "5"}'))
    assert inputs(records(tmp_path)) == ["1", "2", "3", "4"]
    assert inputs(records(tmp_path, "validation")) == ["5"], "once, though it is there twice"
    (tmp_path / "test.json").write_text(json.dumps(numbered(6), indent=1))
    assert inputs(records(tmp_path, "test")) == ["6"]


def test_a_pattern_is_the_files_that_match_it(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"part-{name}.jsonl", *numbered(name))
    (tmp_path / "part-d").mkdir()
    pattern = str(tmp_path / "part-*")
    assert inputs(records(pattern, validation_fraction=0)) == ["a", "b", "c"]
    records.validate(path=pattern)
    with pytest.raises(FileNotFoundError, match="no examples at"):
        records(str(tmp_path / "none-*"))


def test_files_beside_the_records_are_left_out_and_named(tmp_path, caplog):
    write(tmp_path / "a.jsonl", *numbered(1))
    (tmp_path / "more.csv").write_text("input\n2\n")
    (tmp_path / "about.json").write_text('{"license": "mit"}')
    assert inputs(records(tmp_path, validation_fraction=0)) == ["1"]
    assert "reads its .jsonl files, not more.csv" in caplog.text
    (tmp_path / "a.jsonl").unlink()
    assert inputs(records(tmp_path, validation_fraction=0)) == ["2"]
    (tmp_path / "more.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no examples in .* found about.json"):
        records(tmp_path)
    (tmp_path / "list.json").write_text(json.dumps(numbered(3, 4), indent=1))
    assert inputs(records(tmp_path, validation_fraction=0)) == ["3", "4"]


@pytest.mark.parametrize("times", [1, 10])
def test_an_only_record_is_trained_on(tmp_path, times):
    path = tmp_path / "one.jsonl"
    write(path, *numbered(7) * times)
    assert inputs(records(path)) == ["7"] * times
    held_out = records(path, "validation")
    assert list(held_out) == []
    assert "it has no two different records, and one is for training" in held_out.if_empty
    assert "validator=none" in held_out.if_empty


def test_bad_lines_come_in_place_and_with_their_place(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input": "a"}\n\n{"input": \n[1]\n"\xff"\n')
    (first, record), *bad = records(path, validation_fraction=0)
    assert first == f"{path}:1" and record == {"input": "a"}
    assert [where for where, _ in bad] == [f"{path}:3", f"{path}:4", f"{path}:5"]
    words = ["not JSON: Expecting value", "a JSON list instead of an object", "not UTF-8 text"]
    for (_, error), word in zip(bad, words, strict=True):
        assert isinstance(error, ValueError) and word in str(error)


def test_the_fingerprint_is_of_the_content(tmp_path):
    write(tmp_path / "a" / "train.jsonl", *numbered(1, 2))
    write(tmp_path / "b" / "train.jsonl", *numbered(1, 2))
    a, b = (records(tmp_path / name) for name in "ab")
    assert a.fingerprint() == b.fingerprint() != records(tmp_path / "a", "validation").fingerprint()
    write(tmp_path / "b" / "train.jsonl", *numbered(1, 3))
    assert a.fingerprint() != b.fingerprint()


def test_what_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no examples at '.*nowhere': there is no such"):
        records(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no examples at 'mine.jsonl'"):
        records("mine.jsonl")
    with pytest.raises(FileNotFoundError, match=r"'.*gone.jsonl'"):
        records([tmp_path / "gone.jsonl"])
    with pytest.raises(FileNotFoundError, match=r"looked for train/\*\.jsonl"):
        records(tmp_path)
    with pytest.raises(ValueError, match="split='dev' must be one of train, validation, test"):
        records(tmp_path, "dev")
    with pytest.raises(ValueError, match="validation_fraction=1"):
        records(tmp_path, validation_fraction=1)
    with pytest.raises(ValueError, match=r"path=\[\]: an empty list"):
        records([])
    with pytest.raises(ValueError, match="path=None: give a folder"):
        records(None)
    with pytest.raises(ValueError, match="is a folder: a list holds files only"):
        records([tmp_path])
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"looked for train/\*\.jsonl.* found notes.md"):
        records(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/no/such.jsonl"}, r"^path='/no/such.jsonl': no examples at"),
        ({"path": "gone.parquet"}, r"^path='gone.parquet': no examples at"),
        ({"path": "{here}/notes.txt"}, r"^path='.*notes.txt': .* not a file of records"),
        ({"path": "{here}"}, r"^path=.*: no examples in .* found notes.txt"),
        ({"path": ["{here}/a.jsonl"]}, r"^path=\[.*a.jsonl"),
        ({"path": None}, r"^path=None: give a folder"),
        ({"path": []}, r"^path=\[\]: an empty list"),
        ({"split": "dev"}, r"^split='dev' must be one of"),
        ({"validation_fraction": -1}, r"^validation_fraction=-1"),
    ],
)
def test_a_source_is_validated_without_reading_it(tmp_path, options, message):
    (tmp_path / "notes.txt").write_text("Dear diary,")
    path = options.get("path")
    if isinstance(path, str):
        options = options | {"path": path.format(here=tmp_path)}
    elif path:
        options = options | {"path": [p.format(here=tmp_path) for p in path]}
    with pytest.raises(ValueError, match=message):
        records.validate(**options)


def test_what_cannot_be_known_before_it_is_built_is_left_alone(tmp_path):
    records.validate()
    records.validate(path="org/name", split="train")
    records.validate(path=object())
    write(tmp_path / "a.jsonl", *numbered(1, 2))
    records.validate(path=str(tmp_path), split="validation")
    nothing = {"split": "validation", "validation_fraction": 0}
    with pytest.raises(ValueError, match=r"^validation_fraction=0: .*no valid.*validator=none"):
        records.validate(path=str(tmp_path), **nothing)
    with pytest.raises(ValueError, match=r"in a folder with train.jsonl and val.jsonl"):
        records.validate(path=str(tmp_path / "a.jsonl"), **nothing)
    records.validate(path="gone.jsonl", **nothing)  # as the training split says


def test_a_name_of_the_hub_that_cannot_be_reached_says_so(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'no/such': .*Hugging Face Hub it cannot be read"):
        records("no/such")


def test_hugging_face_datasets_and_the_names_of_their_labels(tmp_path):
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = {"sentence": ["a", "b", "c"], "label": [1, 0, -1]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    splits = {"train": dataset, "validation": dataset.select([0]), "test": dataset.select([2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "all")
    found = list(records(tmp_path / "all"))
    assert [record["label"] for _, record in found] == ["good", "bad", None]
    assert found[1][0].endswith("all train, row 1")
    assert len(list(records(tmp_path / "all", "validation"))) == 1
    assert len(list(records(tmp_path / "all", "test"))) == 1
    dataset.save_to_disk(tmp_path / "one")
    assert len(list(records(tmp_path / "one", validation_fraction=0))) == 3
    again = [records(tmp_path / "all").fingerprint() for _ in range(2)]
    assert again[0] == again[1] != records(tmp_path / "one").fingerprint()


def test_names_of_labels_in_lists(tmp_path):
    import datasets

    tag = datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(tag)}
    )
    rows = {"tokens": [["in", "Ann"], ["x"]], "tags": [[0, 1], [-1]]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        found = [record["tags"] for _, record in records(path, validation_fraction=0)]
        assert found == [["O", "B-PER"], [None]]


def test_examples_in_memory_and_to_debug_with():
    assert inputs(in_memory(numbered(1, 2))) == ["1", "2"]
    assert in_memory(numbered(1)).fingerprint() != in_memory(numbered(2)).fingerprint()
    static = [record for _, record in synthetic(3, token_id=7, input_tokens=2, output_tokens=4)]
    assert static == [{"input": [7, 7], "output": [7, 7, 7, 7]}] * 3
    random = inputs(synthetic(50, static=False, vocab_size=100, seed=1))
    assert len(set(map(tuple, random))) > 10 and max(map(max, random)) < 100
    assert random == inputs(synthetic(50, static=False, vocab_size=100, seed=1))


def test_nulls_that_arrow_puts_into_objects_are_left_out(tmp_path):
    """Within a column every object has the keys of all others; a null column is the author's."""
    import datasets

    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": None}}]
    rows = [
        {"input": None, "messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls
    ]
    datasets.Dataset.from_list([*rows, {"input": "a", "messages": []}]).save_to_disk(tmp_path / "a")
    found = [record for _, record in records(tmp_path / "a", validation_fraction=0)]
    assert found[0] == rows[0], "without y"
    assert found[1]["messages"][0]["tool_calls"] == [{"name": "g", "arguments": {}}]
    write(tmp_path / "a.jsonl", rows[1])
    assert [r for _, r in records(tmp_path / "a.jsonl", validation_fraction=0)] == [rows[1]]
