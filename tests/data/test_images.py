"""Records with images: where they stand, what is learned, and what is wrong with them."""

from __future__ import annotations

import json

import datasets
import pytest
import torch

from ditty_di.data import (
    ImageRenderer,
    ImageTextCollate,
    PaddedCollate,
    TokenBudgetDataset,
    TokenizedDataset,
    in_memory,
    records,
)
from ditty_di.data.rendering.images import read_image
from tests.models import image_text as tiny

USER, ASSISTANT = "user : ", " <end> assistant : "
IMAGE = (
    "<fake_token_around_image> <global-img> <image> <image> <image> <image> "
    "<fake_token_around_image>"
)


@pytest.fixture(scope="module")
def processor():
    with tiny.videos_unread():
        return tiny.FAMILIES["smolvlm"]()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for n in range(3):
        tiny.picture(folder / "sub" / f"{n}.png", n)
    (folder / "sub" / "text.png").write_text("no image")
    whole = (folder / "sub" / "0.png").read_bytes()
    (folder / "sub" / "half.png").write_bytes(whole[: len(whole) // 2])
    return folder


def rendered(processor, record, **options):
    (found,) = ImageRenderer(processor.tokenizer, processor=processor, **options)([record])
    return found


def texts(processor, example):
    decode = processor.tokenizer.decode
    learned = [i for i, output in zip(example.ids, example.output, strict=True) if output]
    return decode(example.ids), decode(learned)


def turns(*contents):
    roles = ("user", "assistant") * 3
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


PART, ASK = {"type": "image"}, {"type": "text", "text": " a b"}


@pytest.mark.parametrize(
    "record, question, images",
    [
        ({"image": "0.png", "input": "a b", "output": " one"}, f"{IMAGE} a b", "0"),
        (
            {"image": ["0.png", "1.png"], "prompt": "a", "completion": " one"},
            f"{IMAGE} {IMAGE} a",
            "01",
        ),
        ({"image": "1.png", "text": " one"}, IMAGE, "1"),
        ({"image": "0.png", "messages": turns(" a b", " one")}, f"{IMAGE} a b", "0"),
        (
            {"images": ["2.png", "1.png"], "messages": turns([PART, ASK, PART], " one")},
            f"{IMAGE} a b {IMAGE}",
            "21",
        ),
        (
            {"messages": turns([ASK, {"type": "image", "path": "2.png"}], " one")},
            f"a b {IMAGE}",
            "2",
        ),
    ],
)
def test_images_stand_where_the_record_says(processor, folder, record, question, images):
    """And only the answer is learned, whatever form the record has."""
    renderer = ImageRenderer(processor.tokenizer, processor=processor)
    ((example,),) = renderer([renderer.resolved(record, folder / "sub")])
    whole, learned = texts(processor, example)
    assert whole == f"{USER}{question}{ASSISTANT}one <end>" and learned == "one <end>"
    assert example.images == tuple(str(folder / "sub" / f"{n}.png") for n in images)
    assert not example.notes
    asked = renderer.resolved(record, folder / "sub")
    assert whole.startswith(processor.tokenizer.decode(renderer.prompt(asked)))
    assert renderer.prompt_images(asked) == list(example.images)


@pytest.mark.parametrize("stored", ["saved", "rows.parquet", "memory"])
def test_images_inside_a_data_set_are_unpacked_into_the_cache(
    processor, folder, tmp_path, monkeypatch, stored
):
    """As the Hub's have them: a column of images, one or several a row, by their bytes."""
    monkeypatch.setenv("DITTY_DI_CACHE", str(tmp_path / "cache"))
    read = [tiny.Image.open(folder / "sub" / f"{n}.png").copy() for n in range(3)]
    rows = [
        {"images": [read[0], read[1]], "input": "a b", "output": " one"},
        {"images": [read[2]], "input": "c", "output": " two"},
        {"images": [read[0]], "input": "c", "output": " three"},
    ]
    if stored == "memory":
        source = in_memory(rows)
        assert in_memory(rows).fingerprint() == source.fingerprint()
    else:
        features = datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "input": datasets.Value("string"),
                "output": datasets.Value("string"),
            }
        )
        made = datasets.Dataset.from_list(rows, features=features)
        made.save_to_disk(tmp_path / "saved")
        made.to_parquet(tmp_path / "rows.parquet")
        source = records(tmp_path / stored, validation_fraction=0)
    renderer = ImageRenderer(processor.tokenizer, processor=processor)
    examples = TokenizedDataset(source, renderer)
    paths = [examples[row][0]["images"] for row in range(3)]
    assert [len(own) for own in paths] == [2, 1, 1] and paths[2] == paths[0][:1]
    for path, n in zip([*paths[0], *paths[1], *paths[2]], (0, 1, 2, 0), strict=True):
        assert read_image(path).tobytes() == read_image(str(folder / "sub" / f"{n}.png")).tobytes()
    files = [file for file in (tmp_path / "cache" / "images").rglob("*") if file.is_file()]
    assert len(files) == 3, "equal images once"


def test_a_column_of_one_image_and_images_in_turns(processor, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DITTY_DI_CACHE", str(tmp_path))
    raw = (folder / "sub" / "1.png").read_bytes()
    path = str(folder / "sub" / "0.png")
    renderer = ImageRenderer(processor.tokenizer, processor=processor)
    for image in ({"bytes": raw, "path": "name.png"}, {"bytes": None, "path": path}, raw):
        for record in (
            {"image": image, "input": "a", "output": " b"},
            {"messages": turns([PART | {"image": image}, ASK], " b")},
        ):
            ((example,),) = renderer([renderer.resolved(record, None)])
            (found,) = example.images
            assert found == path or found.startswith(str(tmp_path / "images"))


def test_the_same_part_of_images_is_held_out_each_time(folder):
    rows = [{"image": tiny.Image.open(folder / "sub" / f"{n % 3}.png"), "n": n} for n in range(40)]
    again = [row | {"image": row["image"].copy()} for row in rows]
    assert in_memory(rows).fingerprint() == in_memory(again).fingerprint()


@pytest.mark.parametrize(
    "record, question",
    [
        ({"image": "0.png", "input": "a <image> b", "output": " one"}, f"a {IMAGE} b"),
        (
            {"images": ["0.png", "1.png"], "messages": turns("<image> a <image>", " one")},
            f"{IMAGE} a {IMAGE}",
        ),
        (
            {"image": "0.png", "messages": turns([{"type": "text", "text": "a <image>"}], " one")},
            f"a {IMAGE}",
        ),
    ],
)
def test_markers_in_the_text_are_the_places_of_images_beside_it(
    processor, folder, record, question
):
    renderer = ImageRenderer(processor.tokenizer, processor=processor)
    ((example,),) = renderer([renderer.resolved(record, folder / "sub")])
    assert texts(processor, example)[0] == f"{USER}{question}{ASSISTANT}one <end>"


def test_each_answer_alone_has_the_images_before_it(processor, folder):
    paths = [str(folder / "sub" / f"{n}.png") for n in range(2)]
    messages = turns([PART | {"path": paths[0]}], " one", [PART | {"path": paths[1]}, ASK], " two")
    first, second = rendered(processor, {"messages": messages}, assistant_turns="each")
    assert (first.images, second.images) == ((paths[0],), tuple(paths))
    assert texts(processor, second)[1] == "two <end>"


def test_generation_tags_mark_answers_behind_images(processor, folder):
    template = processor.tokenizer.chat_template
    marked = (
        "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }} <end>{% endgeneration %} {% else %}{% for p in m.content %}"
        "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %} <end> "
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )
    processor.tokenizer.chat_template = marked
    try:
        path = str(folder / "sub" / "0.png")
        messages = turns([PART | {"path": path}, ASK], " one", [ASK], " two three")
        (example,) = rendered(processor, {"messages": messages})
    finally:
        processor.tokenizer.chat_template = template
    assert texts(processor, example)[1] == "one <end> two three <end>"


@pytest.mark.parametrize(
    "record, message",
    [
        ({"image": "9.png", "input": "a", "output": "b"}, "9.png does not exist"),
        (
            {"image": "text.png", "input": "a", "output": "b"},
            "text.png cannot be read: cannot identify",
        ),
        (
            {"image": "half.png", "input": "a", "output": "b"},
            "half.png cannot be read: .*truncated",
        ),
        ({"image": 3, "input": "a", "output": "b"}, '"image" must be an image'),
        (
            {"image": "https://x.org/0.png", "input": "a", "output": "b"},
            "0.png is a URL: download it, and write the path of the file",
        ),
        (
            {"image": "data:image/png;base64," + "A" * 5000, "input": "a", "output": "b"},
            r"data:image/png;base64,A{1,60}\.\.\. is a URL: .{,60}$",
        ),
        (
            {"image": {"path": "9.png"}, "input": "a", "output": "b"},
            "9.png does not exist",
        ),
        ({"image": {"width": 3}, "input": "a", "output": "b"}, '"image" must be an image'),
        ({"video": "x.mp4", "input": "a", "output": "b"}, '"video": videos are not read'),
        (
            {"messages": turns([{"type": "video", "path": "x.mp4"}, ASK], "b")},
            "a part of type 'video'; .*videos are not read",
        ),
        (
            {"messages": turns([{"type": "image_url", "image_url": {"url": "0.png"}}], "b")},
            r"type 'image_url'; .*write {\"type\": \"image\", \"path\": ...}",
        ),
        (
            {"images": ["0.png"], "messages": turns("<image> a <image>", "b")},
            "the text has 2 markers <image> for 1 image",
        ),
        ({"image": "0.png"}, 'neither "messages", "input" and "output", nor "text"'),
        ({"images": ["0.png"], "messages": turns([PART, PART], "b")}, "2 parts .* and 1 images"),
        ({"messages": turns([PART], "b")}, 'has an image without the "path" of a file'),
        (
            {"messages": turns("<image> a", " b")},
            "renders 1 image placeholders <image> for 0 images",
        ),
        ({"input": "<image> a", "output": "b"}, "has the image token <image>, and no image"),
        ({"image": "0.png", "messages": turns()}, "no turn of the user"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(processor, folder, record, message):
    file = folder / "sub" / "bad.jsonl"
    good = {"image": "0.png", "input": "a", "output": "b"}
    file.write_text(json.dumps(good) + "\n" + json.dumps(record) + "\n")
    renderer = ImageRenderer(processor.tokenizer, processor=processor)
    slots = {"records": records(file, validation_fraction=0), "renderer": renderer}
    with pytest.raises(ValueError, match=rf"1 of 2 .*\n{file}:2: .*{message}"):
        TokenizedDataset.rehearse({**slots, "loss_mask": "output_only"}.__getitem__)


def test_a_limit_that_cuts_an_image_is_an_error_and_text_is_cut(processor, folder):
    path = str(folder / "sub" / "0.png")
    late = {"messages": turns(" a", " b", [ASK, PART | {"path": path}], " c")}
    (found,) = rendered(processor, late, max_tokens=15)
    assert isinstance(found, ValueError) and "would cut an image: raise data.seq_len" in str(found)
    (found,) = rendered(processor, {"image": path, "text": " a" * 30}, max_tokens=20)
    assert len(found.ids) == 21 and found.cut and found.images == (path,)


def test_a_text_renderer_refuses_images_and_says_what_reads_them(processor):
    from ditty_di.data import Renderer

    (found,) = Renderer(processor.tokenizer)([{"messages": turns([PART | {"path": "x"}], "b")}])[0]
    assert "data=image_text reads images" in str(found)


def test_images_that_have_changed_since_are_found(processor, tmp_path):
    with tiny.videos_unread():
        own = tiny.FAMILIES["qwen2_5_vl"]()[1]  # more tokens for larger images
    tiny.picture(tmp_path / "0.png", 0)
    renderer = ImageRenderer(own.tokenizer, processor=own)
    source = in_memory([{"image": str(tmp_path / "0.png"), "text": " a"}])
    examples = TokenizedDataset(source, renderer, cache_dir=tmp_path / "cache")
    tiny.picture(tmp_path / "0.png", 0, (32, 16))
    with pytest.raises(ValueError, match=r"files have changed since they were tokenized .*0\.png"):
        ImageTextCollate(own, PaddedCollate())([examples[0]])


def test_the_same_records_in_another_folder_have_its_images(processor, tmp_path):
    """The tokens are the same, so the cache might give the paths of the first folder."""
    renderer = ImageRenderer(processor.tokenizer, processor=processor)
    found = []
    for name in ("one", "two"):
        tiny.picture(tmp_path / name / "0.png", 0)
        file = tmp_path / name / "train.jsonl"
        file.write_text(json.dumps({"image": "0.png", "text": " a"}) + "\n")
        source = records(file, validation_fraction=0)
        examples = TokenizedDataset(source, renderer, cache_dir=tmp_path / "cache")
        found.append(examples[0][0]["images"])
    assert found == [[str(tmp_path / name / "0.png")] for name in ("one", "two")]


def test_rows_of_padding_and_of_a_token_budget_get_their_images(processor, folder, tmp_path):
    renderer = ImageRenderer(processor.tokenizer, processor=processor)
    source = in_memory(
        [{"image": str(folder / "sub" / f"{n % 3}.png"), "text": " a" * (n + 1)} for n in range(4)]
    )
    examples = TokenizedDataset(source, renderer, cache_dir=tmp_path)
    collate = ImageTextCollate(processor, PaddedCollate())
    assert collate.pads_rows
    inputs, labels = collate([examples[0], None])
    assert inputs["pixel_values"].shape[1] == 1 and len(labels) == 2
    inputs, labels = collate([None, None])  # a rank without rows: its tower still runs
    assert inputs["pixel_values"].shape[1] == 1 and not (labels >= 0).any()
    budget = TokenBudgetDataset(examples, max_tokens=40)
    inputs, labels = collate([budget[0]])
    assert inputs["pixel_values"].shape[1] == len(labels) > 1
    assert torch.isin(inputs["input"], torch.tensor(collate.images.token_ids)).sum() == 4 * len(
        labels
    )


def test_pixels_are_rgb_whatever_the_file_has(tmp_path):
    tiny.Image.new("LA", (2, 3), (200, 0)).save(tmp_path / "gray.png")
    assert read_image(str(tmp_path / "gray.png")).mode == "RGB"
