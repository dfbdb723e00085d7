"""Thousands of damaged files: one message or none, never a box that is no box, and `skip` keeps all that is good."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.command import for_people
from data_sharding import images
from data_sharding.pack import pack
from data_sharding.problems import BadImage
from data_sharding.record import Record
from tests.data_sharding.formats import (
    FORMATS,
    SIZES,
    Format,
    coco_content,
    expected,
    image_file,
    labels_of,
    require_sound,
    voc_xml,
)

CASES = 600
NASTY: list[Any] = [
    *(None, True, -1, 0, 1.5, 1e308, math.nan, math.inf, -math.inf, 10**400, 2**63, -(2**63) - 1),
    *("", "x", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "y" * 5000, [], {}, [[]], [math.nan] * 4),
    *([5, 5, -1, 2], [5, 5, 0, 3], [1e9, 1e9, 1, 1], [0, 0, 1e-9, 1e-9], [1, 2, 3], [-1e30, -1e30, 2e30, 2e30]),
]
FIELDS = ["id", "file_name", "width", "height", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore"]
NUMBERS = ["nan", "inf", "-1", "-7", "0", "1e400", "1e9", "999999999", "9" * 5000, "", "x", "0x10", "²", "1_0", "5.5"]


def _read(data: Format) -> list[Record] | str:
    """Every record, each of them sound; or what the user is told."""
    try:
        records = list(data.module.records(data.config, "train"))
    except ValueError as error:
        # The packer makes its one message of bad images; everything else must be a message that our code raised.
        if not isinstance(error, BadImage) and not for_people(error):
            raise
        return str(error)
    for record in records:
        require_sound(record)
    return records


def _kept(stop: Format, skip: Format, damage: Callable[[Format], None], good: set[Any]) -> bool:
    """Damage both; whether the damage was found. `good`: what `skip` must keep if it can go on."""
    for data in (stop, skip):
        damage(data)
    told, left = _read(stop), _read(skip)
    if isinstance(left, str):
        assert "on_bad=skip" not in left, "skip must not stop with what can be skipped"
    else:
        assert good <= labels_of(left)
        if isinstance(told, list):
            assert labels_of(told) == labels_of(left)
    return isinstance(told, str)


def _pair(name: str, folder: Path) -> tuple[Format, Format]:
    stop, skip = (FORMATS[name](folder / on_bad, on_bad) for on_bad in ("stop", "skip"))
    return stop, skip


def _blind(text: bytes, rng: random.Random) -> bytes:
    """Bytes cut off, changed, repeated or thrown away without looking."""
    data, where = bytearray(text), rng.randrange(len(text))
    match rng.randrange(4):
        case 0:
            del data[where:]
        case 1:
            for _ in range(rng.choice([1, 2, 9])):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            data[where:where] = data[: rng.randrange(40)]
        case _:
            del data[where : where + rng.randrange(1, 30)]
    return bytes(data)


def _damaged_coco(rng: random.Random) -> tuple[bytes, set[Any]]:
    """One entry made wrong, and what all the others say."""
    content, kind = coco_content(), rng.choice(["images", "annotations", "annotations"])
    place = rng.randrange(len(content[kind]))
    entry = content[kind][place]
    by_id = {i["id"]: Path(i["file_name"]).stem for i in content["images"]}
    good = expected(without=by_id[entry["id" if kind == "images" else "image_id"]])
    match rng.randrange(3):
        case 0:
            entry.pop(rng.choice(list(entry)))
        case 1:
            entry[rng.choice(FIELDS)] = rng.choice(NASTY)
        case _:
            content[kind][place] = rng.choice(NASTY)
    return json.dumps(content).encode(), good


def _damaged_visdrone(rng: random.Random) -> tuple[bytes, set[Any]]:
    lines = ["4,4,10,12,1,4,0,0", "20,10,9,9,1,4,0,0"]
    fields = lines[0].split(",")
    fields[rng.randrange(8)] = rng.choice(NUMBERS)
    lines[0] = ",".join(fields[: rng.choice([8, 8, 8, rng.randrange(9)])]) + rng.choice(["", "", ",", ",1", "\0"])
    return "\n".join(lines).encode(), expected() - {("a.jpg", (4.0, 4.0, 14.0, 16.0))}


def _damaged_voc(rng: random.Random) -> tuple[bytes, set[Any]]:
    text = voc_xml("a")
    tags = list(re.finditer(r"<(\w+)>[^<>]*</\1>", text))
    tag = rng.choice(tags)
    made = rng.choice(["", f"<{tag[1]}>{rng.choice(NUMBERS)}</{tag[1]}>", tag[0] * 2, f"<{tag[1]}><a/></{tag[1]}>"])
    return (text[: tag.start()] + made + text[tag.end() :]).encode("utf-8", "replace"), expected(without="a")


DAMAGED = {"coco": _damaged_coco, "visdrone": _damaged_visdrone, "voc": _damaged_voc}


@pytest.mark.parametrize("name", FORMATS)
def test_undamaged_data_is_read_whole(name: str, tmp_path: Path) -> None:
    for data in _pair(name, tmp_path):
        records = _read(data)
        assert not isinstance(records, str)
        assert labels_of(records) == expected()
        assert {r.file_name for r in records} == {f"{stem}.jpg" for stem in SIZES}


@pytest.mark.parametrize("name", FORMATS)
def test_one_wrong_entry_costs_itself_alone(name: str, tmp_path: Path) -> None:
    rng, pair, found = random.Random(1), _pair(name, tmp_path), 0
    for _ in range(CASES):
        content, good = DAMAGED[name](rng)
        found += _kept(*pair, lambda data, content=content: _write(data, content), good)
    assert found > CASES / 3


@pytest.mark.parametrize("name", FORMATS)
def test_blindly_damaged_label_files_are_told_or_read(name: str, tmp_path: Path) -> None:
    rng, pair, found = random.Random(2), _pair(name, tmp_path), 0
    whole = pair[0].labels.read_bytes()
    good = set() if name == "coco" else expected(without="a")
    for _ in range(CASES // 2):
        content = _blind(whole, rng)
        found += _kept(*pair, lambda data, content=content: _write(data, content), good)
    assert found > CASES / 20


def _write(data: Format, content: bytes) -> None:
    data.labels.write_bytes(content)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_image_files_are_found_while_packing(name: str, tmp_path: Path) -> None:
    rng, pair = random.Random(3), _pair(name, tmp_path)
    whole = {stem: image_file(stem) for stem in SIZES}
    found = 0
    for case in range(60):
        stem = rng.choice(list(SIZES))
        content = rng.choice([_blind(whole[stem], rng), whole[stem][: rng.randrange(len(whole[stem]))], b"no image"])
        for data in pair:
            (data.images / f"{stem}.jpg").write_bytes(content)
        kept = pack(pair[1].config, pair[1].module, "train", tmp_path / f"skip{case}")
        records = [kept.record(i) for i in range(len(kept))]
        if len(records) == len(SIZES):
            assert images.decode(content).shape[1:] == SIZES[stem][::-1]
            assert labels_of(records) == expected()
        else:
            found += 1
            assert labels_of(records) == expected(without=stem)
            with pytest.raises(ValueError, match=f"1 x (image|missing).*\n  {stem}.jpg") as told:
                pack(pair[0].config, pair[0].module, "train", tmp_path / f"stop{case}")
            assert for_people(told.value)
        for data in pair:
            (data.images / f"{stem}.jpg").write_bytes(whole[stem])
    assert 30 < found < 60


def test_the_quick_look_at_an_image_says_what_decoding_says() -> None:
    rng, accepted = random.Random(4), 0
    for _ in range(CASES):
        content = _blind(image_file(rng.choice(list(SIZES)), rng.choice(["jpg", "jpg", "png"])), rng)
        answers = []
        for look in (images.require_whole, images.decode):
            try:
                look(content)
                answers.append(True)
            except ValueError:
                answers.append(False)
        assert answers[0] == answers[1]
        accepted += answers[0]
    assert 0 < accepted < CASES
