"""Each world's answers are those of a game played by hand, and a seed always gives the same documents."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest

from rpt_lightning.types import Document
from rpt_lightning.worlds import Answer, Boxes, Cups, Origins, People, World

WORLDS = (Cups, Origins, People, Boxes)


def answer(document: Document) -> str:
    (mark,) = document.marks
    return document.text[mark.start : mark.end].strip()


def cups_by_hand(text: str) -> str:
    """Play with eight real cups. A move lays them out in a new order, and the ball lies in one of them."""
    before, _ = text.rsplit(". The ball", 1)
    start, *moves = re.findall(r"cup (\d)|\d+ ([a-z]+)", before)
    cups = ["ball" if place == int(start[0]) else "" for place in range(1, 9)]
    for _, move in moves:
        if move == "turn":
            cups = cups[-1:] + cups[:-1]
        elif move == "flip":
            cups[0], cups[1] = cups[1], cups[0]
        elif move == "cross":
            cups.reverse()
        elif move == "split":
            cups = [cup for pair in zip(cups[:4], cups[4:], strict=True) for cup in pair]
        else:
            raise AssertionError(move)
    return str(cups.index("ball") + 1)


def people_by_hand(text: str) -> str:
    first = text.split()[0]
    has = {name: name == first for name in ("Ann", "Bo", "Cy", "Di", "Ed")}
    for left, right in re.findall(r"(\w+) swaps with (\w+)", text):
        has[left], has[right] = has[right], has[left]
    return next(name for name in has if has[name])


def boxes_by_hand(text: str) -> str:
    note = dict(re.findall(r"Box (\d+) says (\d+)\.", text))
    box, times = re.search(r"From box (\d+) follow (\d+)", text).groups()
    for _ in range(int(times)):
        box = note[box]
    return box


@pytest.mark.parametrize(
    ("world", "by_hand"), [(Cups, cups_by_hand), (People, people_by_hand), (Boxes, boxes_by_hand)]
)
def test_answers_are_right_and_depths_are_counted(world, by_hand):
    depths = set()
    for document in world(num_documents=300, min_depth=1, max_depth=9, seed=3).documents():
        assert answer(document) == by_hand(document.text)
        (mark,) = document.marks
        # The thought ends at the answer, after one step for each unit of depth.
        assert mark.thought.rstrip(".").split()[-1] == answer(document)
        depth = mark.fields["depth"]
        steps = {Cups: r" \d+ (turn|flip|cross|split)", People: r" \d+ (Ann|Bo|Cy|Di)", Boxes: r" says"}[
            world
        ]
        assert len(re.findall(steps, mark.thought)) == depth
        depths.add(depth)
    assert depths == set(range(1, 10))


def test_a_game_of_cups_word_for_word():
    """Check the game by hand.

    Cup 7 is not among the first two. From the other end it is cup 2. In two halves interleaved, 1 5 2 6 3 7 4
    8, cup 2 comes third.
    """
    (document,) = Cups(num_documents=1, min_depth=3, max_depth=3, seed=1).documents()
    assert document.text == "The ball is under cup 7. 13 flip 14 cross 15 split. The ball is under cup 3."
    assert document.marks[0].thought == " cup 7. 13 flip 7 14 cross 2 15 split 3."
    assert document.doc_id == "cups-1-0"


@pytest.mark.parametrize("world", WORLDS)
def test_the_same_seed_writes_the_same_documents_in_another_process(world):
    code = (
        f"from rpt_lightning.worlds import {world.__name__} as W; "
        "print([d.text for d in W(num_documents=5, seed=7).documents()])"
    )
    texts = [document.text for document in world(num_documents=5, seed=7).documents()]
    for hash_seed in ("0", "1"):
        printed = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hash_seed, **_path()},
        )
        assert printed.stdout.strip() == str(texts)
    assert texts != [document.text for document in world(num_documents=5, seed=8).documents()]
    # A longer corpus begins with the shorter one.
    assert texts == [document.text for document in world(num_documents=9, seed=7).documents()][:5]


def test_origins_are_found_from_the_end_and_ends_from_the_beginning():
    depths = set()
    for document in Origins(num_documents=300, min_depth=1, max_depth=9, seed=3).documents():
        first, last = document.marks
        texts = {mark.fields["place"]: document.text[mark.start : mark.end] for mark in document.marks}
        assert texts["last"].strip() == cups_by_hand(document.text)
        # Of the eight games that differ in the first place alone, only the true one ends as this one does.
        ends = {
            str(cup): cups_by_hand(document.text[: first.start] + f" {cup}" + document.text[first.end :])
            for cup in range(1, 9)
        }
        assert [cup for cup, end in ends.items() if f" {end}" == texts["last"]] == [texts["first"].strip()]
        depth = first.fields["depth"]
        for mark, one, other in ((first, "first", "last"), (last, "last", "first")):
            steps = re.findall(r" (\d+) (?:turn|flip|cross|split) (\d)", mark.thought)
            assert mark.thought.startswith(f" cup{texts[other]}.")  # what is given
            assert f" {steps[-1][1]}" == texts[one]  # what is found
            assert [int(number) for number, _ in steps] == (
                list(range(1, depth + 1)) if one == "last" else list(range(depth, 0, -1))
            )
        depths.add(depth)
    assert depths == set(range(1, 10))


def test_a_game_of_origins_word_for_word():
    """Check the game by hand.

    From the end: the split brought cup 2 to 3, the cross brought 7 to 2, and the flip left 7 alone.
    """
    world = Origins(num_documents=1, min_depth=3, max_depth=3)

    class Fixed(random.Random):
        def randint(self, low, high):
            return 7

        def choice(self, moves):
            self.left = getattr(self, "left", ["flip", "cross", "split"])
            return self.left.pop(0)

    pieces = world.write(Fixed(0), 3)
    assert [piece if isinstance(piece, str) else piece.text for piece in pieces] == [
        "The ball is under cup", " 7", ". 1 flip 2 cross 3 split. The ball is under cup", " 3", ".",
    ]  # fmt: skip
    assert pieces[1].thought == " cup 3. 3 split 2 2 cross 7 1 flip 7."
    assert pieces[3].thought == " cup 7. 1 flip 7 2 cross 2 3 split 3."


def test_an_origin_of_an_untold_game_is_known_to_nobody():
    documents = list(Origins(num_documents=1000, untold=0.5, seed=1).documents())
    untold = [document for document in documents if not document.marks[0].fields["told"]]
    assert 430 < len(untold) < 570  # four standard deviations are 63
    for document in untold:
        (first,) = document.marks
        assert first.thought is None
        assert document.text.count("cup") == 1
    assert all(len(document.marks) == 2 for document in documents if document not in untold)


def _path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path)}


def test_noise_is_a_share_of_the_documents_and_nobody_can_work_it_out():
    documents = list(Cups(num_documents=2000, noise=0.5, seed=1).documents())
    noisy = [document for document in documents if document.marks[0].fields["noise"]]
    assert 0.45 < len(noisy) / 2000 < 0.55
    assert all(document.marks[0].thought is None for document in noisy)
    # A random cup agrees with the game in one of eight cases.
    agrees = sum(answer(document) == cups_by_hand(document.text) for document in noisy)
    assert 0.09 < agrees / len(noisy) < 0.16


def test_a_world_of_ones_own_says_what_it_is():
    class Twice(World):
        def write(self, rng: random.Random, depth: int) -> list[str | Answer]:
            number = rng.randint(1, 4)
            return [
                f"{number} twice is",
                Answer(
                    text=f" {2 * number}", depth=depth, thought=f" {number} and {number}", fields={"even": 1}
                ),
                ".",
            ]

    world = Twice(num_documents=3, min_depth=1, max_depth=1, seed=5)
    document = next(world.documents())
    assert document.marks[0].fields == {"depth": 1, "even": 1}
    assert int(answer(document)) == 2 * int(document.text.split()[0])
    described = world.describe()
    assert described["class"].endswith("Twice")
    assert (described["num_documents"], described["seed"]) == (3, 5)


@pytest.mark.parametrize(
    ("world", "settings", "says"),
    [
        (Cups, {"num_documents": 0}, "num_documents=0"),
        (People, {"min_depth": 0}, "min_depth=0"),
        (Boxes, {"min_depth": 4, "max_depth": 3}, "max_depth=3"),
        (Boxes, {"max_depth": 12}, "max_depth=12"),
        (Cups, {"noise": 1.5}, r"noise=1\.5"),
        (Origins, {"untold": -0.5}, r"untold=-0\.5"),
    ],
)
def test_settings_without_a_world_are_refused(world, settings, says):
    with pytest.raises(ValueError, match=says):
        world(**settings)
