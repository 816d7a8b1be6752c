"""Label trees: what is shipped, what a file may hold, what records cover, and how a teacher makes a tree grow."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import FrozenInstanceError, replace
from io import BytesIO

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m4ov.data.labels import (
    Label,
    LabelError,
    LabelTree,
    balance,
    capabilities,
    check_labels,
    coverage,
    coverage_map,
    extend,
    sunburst,
    topics,
)
from m4ov.data.labels.coverage import evenness
from m4ov.data.labels.label import normalised
from m4ov.data.records import Record, assistant, image, user
from m4ov.data.shards import WriteError
from m4ov.data.teacher import Reply, TeacherError
from tests.data.teachers import Scripted

SEED = int(os.environ["M4OV_TEST_SEED"])

SMALL = """
name: small
labels:
  - id: a
    title: Animals
    about: Living things.
    vertical: true
    children:
      - id: a.pets
        title: Pets
        about: At home.
        children:
          - {id: a.pets.cats, title: Cats, about: Cats.}
          - {id: a.pets.dogs, title: Dogs, about: Dogs.}
  - {id: b, title: Buildings, about: Houses.}
  - {id: b.old, title: Old buildings, about: Long there., parent: b}
  - {id: b.old.castle, title: Castles, about: With towers., parent: b.old}
"""


def small() -> LabelTree:
    return LabelTree.from_yaml(SMALL, "small.yaml")


def record(id: str, **labels: list[str]) -> Record:
    return Record(id, [user(image("a.png"), "What?"), assistant("That.")], labels=labels)


@pytest.mark.parametrize("name", ["topics", "capabilities"])
def test_shipped_trees_are_whole(name):
    tree = LabelTree.load(name)
    assert tree == {"topics": topics, "capabilities": capabilities}[name]()
    assert tree.levels == 3
    assert len(tree.leaves) >= 50
    assert len(tree.at_level(1)) >= 6
    titles = [normalised(label.title) for label in tree.labels]
    assert len(set(titles)) == len(titles), "a teacher's duplicates are told by titles of the whole tree"
    for leaf in tree.leaves:
        assert [tree[id].parent for id in tree.path(leaf)] == ["", *tree.path(leaf)[:-1]]
        assert all(
            below.startswith(f"{above}.") for above, below in zip(tree.path(leaf), tree.path(leaf)[1:], strict=False)
        )
    assert sum(len(tree.children(id)) for id in ("", *tree.at_level(1), *tree.at_level(2))) == len(tree.labels)


def test_the_topics_have_vertical_domains():
    assert {"shapes", "scans"} <= set(topics().verticals) < set(topics().at_level(1))


def test_nesting_and_parents_make_one_tree():
    tree = small()
    assert tree.leaves == ("a.pets.cats", "a.pets.dogs", "b.old.castle")
    assert tree.path("b.old.castle") == ("b", "b.old", "b.old.castle")
    assert tree.titles("a.pets.cats") == ("Animals", "Pets", "Cats")
    assert tree.path("a.pets") == ("a", "a.pets")
    assert tree["b.old"].line == 16
    with pytest.raises(FrozenInstanceError):
        tree.name = "other"  # type: ignore[misc]


def test_a_tree_is_the_same_after_it_was_written(tmp_path):
    for tree in (small(), topics(), capabilities()):
        path = tmp_path / "of" / f"{tree.name}.yaml"
        tree.save(path)
        assert LabelTree.load(path) == tree
        assert [file.name for file in path.parent.iterdir() if tree.name in file.name] == [path.name]
    with pytest.raises(WriteError, match=r"small\.yaml"):
        small().save(tmp_path / "of" / "topics.yaml" / "small.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("id: a.pets.dogs", "id: a.pets.cats"), r"bad\.yaml, line 14: label 'a.pets.cats': the id stands twice"),
        (("parent: b.old}", "parent: b.odl}"), r"line 17: label 'b.old.castle': .*'b.odl' is not in.*mean 'b.old'"),
        (("{id: b, title: Buildings, about: Houses.}", "{id: b, title: B, about: H., parent: b.old}"), "b → b.old → b"),
        (
            ("{id: b, title: Buildings, about: Houses.}", "{id: b, title: B, about: H., parent: b}"),
            "own ancestor: b → b",
        ),
        (("parent: b.old}", "parent: b}"), "label 'b.old': an empty branch: level 2 of 3"),
        (("parent: b.old}", "parent: a.pets.cats}"), "line 17: label 'b.old.castle': level 4, below 'a.pets.cats'"),
        (("title: Dogs", "title: the CATS!"), "label 'a.pets.dogs': 'a.pets.cats' beside it has the same title"),
        (("about: Dogs.", "about: ''"), "label 'a.pets.dogs': about must be one line of text, got ''"),
        (("title: Dogs, ", ""), "label 'a.pets.dogs': no title"),
        (("title: Dogs", "titel: Dogs"), "label 'a.pets.dogs': unknown key 'titel'; valid here: id, title"),
        (("title: Dogs", "title: 12"), "title must be one line of text, got 12"),
        (("id: a.pets.dogs", "id: A Dog"), "id must be lower-case letters and digits.*got 'A Dog'"),
        (("id: a.pets.dogs", "id: 7"), "id must be lower-case letters and digits.*got 7"),
        (("id: a.pets.dogs", "id: a.pets.dogs, id: x"), "line 14: id stands twice"),
        (("id: a.pets.dogs", "id: a.pets.dogs, parent: b"), "parent 'b' is said of a label that stands below 'a.pets'"),
        (("id: a.pets.dogs", "id: a.pets.dogs, vertical: true"), "vertical is said of the broadest labels only"),
        (("vertical: true", "vertical: 1"), "vertical true or false"),
        (("parent: b.old}", "parent: null}"), "parent must be an id"),
        (("name: small", "name: small\nlevels: 2"), "level 3, below 'a.pets'; the tree has 2 levels"),
        (("name: small", "name: small\nlevels: yes"), "levels must be 1 to 8, got True"),
        (("name: small", "name: [x]"), r"bad\.yaml: name must be text"),
        (("name: small", "nmae: small"), "unknown key 'nmae'"),
        (("name: small", "name: &x small\nlevels: *x"), r"line 3: an alias \(\*x\)"),
        (("name: small", "name: [small"), r"bad\.yaml, line \d+: not YAML"),
        (("name: small", "name: !!python/object:os.system x"), r"line 2: could not determine a constructor"),
        (("name: small", "name: small\n? [k]\n: v"), "a key must be a name"),
        (("name: small", f"name: {'[' * 500}"), "nested more than 32 deep"),
    ],
)
def test_a_broken_file_is_named_with_line_and_label(tmp_path, change, message):
    assert change[0] in SMALL
    path = tmp_path / "bad.yaml"
    path.write_text(SMALL.replace(*change, 1))
    with pytest.raises(LabelError, match=message) as caught:
        LabelTree.load(path)
    assert "bad.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "labels: 3", "name: x\nlabels: []", "name: x\nlabels: [1]", "a: b: c"])
def test_what_is_no_tree_is_refused(text):
    with pytest.raises(LabelError, match=r"^odd\.yaml"):
        LabelTree.from_yaml(text, "odd.yaml")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LabelError, match=r"No such file.*trees of the package: topics, capabilities"):
        LabelTree.load("topic")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(LabelError, match=r"latin\.yaml: not UTF-8"):
        LabelTree.load(tmp_path / "latin.yaml")
    with pytest.raises(LabelError, match="Is a directory"):
        LabelTree.load(tmp_path)


def test_asking_for_what_is_not_there():
    with pytest.raises(LabelError, match=r"no label 'a.pet'; did you mean 'a.pets'"):
        small().path("a.pet")
    with pytest.raises(LabelError, match="levels are 1 to 3, got 4"):
        small().at_level(4)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from(["", *"abcdefgh"]), min_size=1), st.randoms())
def test_parents_make_a_tree_or_are_refused(parents, random):
    """Against a definition of its own: all chains end at the root, and what has no children stands at level 3."""
    labels = [Label(id, f"title {id}", "about", parent) for id, parent in parents.items()]
    random.shuffle(labels)

    def chain(id: str) -> list[str]:
        found = [id]
        while parents.get(found[-1]) and len(found) <= len(parents):
            found.append(parents[found[-1]])
        return found

    chains = {id: chain(id) for id in parents}
    right = all(set(found) <= set(parents) and len(found) <= len(parents) for found in chains.values())
    childless = set(parents) - set(parents.values())
    right = right and bool(childless) and {len(chains[id]) for id in childless} == {3}
    if not right:
        with pytest.raises(LabelError):
            LabelTree("t", tuple(labels))
        return
    tree = LabelTree("t", tuple(labels))
    assert set(tree.leaves) == childless
    assert {id: tree.path(id) for id in parents} == {id: tuple(reversed(found)) for id, found in chains.items()}
    assert LabelTree.from_yaml(tree.to_yaml()) == tree


# --- coverage --------------------------------------------------------------------------------------------------------


def test_labels_of_records_are_checked():
    tree, other = small(), LabelTree.from_yaml(SMALL.replace("a.pets", "a.zoo"), "other.yaml")
    cats, dogs = ["a", "a.pets", "a.pets.cats"], ["a", "a.zoo", "a.zoo.dogs"]
    assert check_labels(record("r", topic=cats, capability=dogs), tree, other) == []
    problems = check_labels(record("r", topic=["b", "a.pets", "a.pets.cats"], size=["x"]), tree, other)
    assert [(problem.tree, problem.kind) for problem in problems] == [
        ("topic", "dangling"),
        ("capability", "missing"),
        ("size", "no such tree"),
    ]
    assert str(problems[0]) == "record 'r': labels.topic: 'a.pets.cats' stands under a / a.pets, not under b / a.pets"
    short_path = check_labels(record("r", topic=cats[:2], capability=dogs), tree, other)
    assert [problem.problem for problem in short_path] == ["2 levels instead of 3"]
    unknown = check_labels(record("r", topic=[*cats[:2], "a.pets.cat"], capability=dogs), tree, other)
    assert [problem.problem for problem in unknown] == ["no label 'a.pets.cat'; did you mean 'a.pets.cats'?"]


def test_coverage_counts_what_is_there():
    random = np.random.default_rng(SEED)
    of_topics, of_capabilities = topics(), capabilities()
    expected = np.zeros((len(of_topics.leaves), len(of_capabilities.leaves)), dtype=np.int64)
    records = []
    for number in range(300):
        row, column = (int(random.integers(n) * random.random()) for n in expected.shape)
        expected[row, column] += 1
        paths = of_topics.path(of_topics.leaves[row]), of_capabilities.path(of_capabilities.leaves[column])
        records.append(record(str(number), topic=list(paths[0]), capability=list(paths[1])))
    records += [record("bad", topic=["nowhere"]), record("none"), record("none too")]
    found = coverage(iter(records), named=2)
    assert np.array_equal(found.counts, expected)
    assert found.refused == {"dangling": 1, "missing": 2}
    assert [problem.id for problem in found.named] == ["bad", "bad"]
    assert found.records == 300
    assert sum(found.of_topics().values()) == sum(found.of_capabilities().values()) == 300
    for level in (1, 2):
        counts = found.at_level(level)
        assert counts.shape == (len(of_topics.at_level(level)), len(of_capabilities.at_level(level)))
        assert counts.sum() == 300
        first = of_topics.at_level(level)[0]
        under = [place for place, leaf in enumerate(of_topics.leaves) if first in of_topics.path(leaf)]
        assert counts[0].sum() == expected[under].sum()
    holes = found.holes()
    assert len(holes) == int((found.at_level(1) == 0).sum())
    assert all(pair[0] in of_topics.at_level(1) and pair[1] in of_capabilities.at_level(1) for pair in holes)
    table = found.table()
    assert sum(row["sum"] for row in table) == 300
    assert table[0]["topic"] == of_topics[of_topics.at_level(1)[0]].title
    said = json.loads(json.dumps(found.to_json()))
    assert sum(count for _, _, count in said["pairs"]) == 300
    assert said["refused"] == {"dangling": 1, "missing": 2}


def test_evenness():
    assert evenness(np.array([5, 5, 5, 5])) == pytest.approx(1)
    assert evenness(np.array([9, 0, 0])) == 0
    assert evenness(np.array([0, 0])) == 0
    assert evenness(np.array([3])) == 1
    assert evenness(np.array([8, 2])) == pytest.approx(0.7219, abs=1e-4)  # bits
    assert 0 < evenness(np.array([7, 2, 1])) < evenness(np.array([4, 3, 3])) < 1
    assert coverage([]).evenness() == {"topic": 0, "capability": 0, "pair": 0}


def test_pictures_are_files_and_the_same_again():
    random = np.random.default_rng(SEED)
    tree = topics()
    counts = {leaf: int(random.integers(0, 50)) for leaf in tree.leaves[::2]}
    drawn = sunburst(tree, counts, title="Topics")
    assert drawn == sunburst(tree, counts, title="Topics")
    assert drawn != sunburst(tree, {**counts, tree.leaves[0]: 99}, title="Topics")
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    paths = [tree.path(leaf) for leaf in tree.leaves]
    records = [
        record("r", topic=list(path), capability=["text", "text.reading", "text.reading.word"]) for path in paths
    ]
    for made in (sunburst(tree, {}, format="png"), coverage_map(coverage(records), format="png", level=2)):
        with Image.open(BytesIO(made)) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(2**24) or ()) > 2
    dollars = LabelTree.from_yaml(SMALL.replace("title: Cats", r"title: '$\frac{$'"))
    assert b"frac" in sunburst(dollars, {}, title="$x^$")
    cats = record("r", topic=["a", "a.pets", "a.pets.cats"], capability=["a", "a.pets", "a.pets.cats"])
    assert coverage_map(coverage([cats], dollars, dollars), level=3, title="$x^$")
    with pytest.raises(ValueError, match="expected svg or png, got 'gif'"):
        sunburst(tree, {}, format="gif")
    with pytest.raises(LabelError, match="a count for 'shapes', which is not a leaf"):
        sunburst(tree, {"shapes": 1})
    with pytest.raises(LabelError, match="whole number of at least 0, got -1"):
        sunburst(tree, {tree.leaves[0]: -1})


# --- growth ----------------------------------------------------------------------------------------------------------


def proposals(*titles: str, **more: object) -> str:
    return json.dumps({"proposals": [{"title": title, "about": f"About {title}."} for title in titles], **more})


def test_a_teacher_extends_a_tree(tmp_path):
    tree = small()
    answers = [proposals("Hamsters", "the cat", "Castles!", "hamster"), f"```json\n{proposals('Cottages')}\n```"]
    teacher = Scripted(answers)
    found = extend(tree, teacher)
    assert [label.id for label in found.added] == ["a.pets.hamsters", "b.old.cottages"]
    assert found.tree.children("a.pets")[-1] == Label("a.pets.hamsters", "Hamsters", "About Hamsters.", "a.pets")
    assert [(refused.at, refused.proposal["title"]) for refused in found.refused] == [
        ("a.pets", "the cat"),
        ("a.pets", "Castles!"),
        ("a.pets", "hamster"),
    ]
    assert "duplicate: 'the cat' is 'Cats'" in found.refused[0].reason
    assert (found.prompt_tokens, found.completion_tokens) == (20, 10)
    assert extend(tree, Scripted(answers)) == found
    asked = [messages[1]["content"] for messages in teacher.asked]
    assert "'Animals' / 'Pets'" in asked[0]
    assert "- Cats: Cats." in asked[0]
    assert "- Castles: With towers." in asked[1]
    found.save(tmp_path / "grown.yaml")
    assert LabelTree.load(tmp_path / "grown.yaml") == found.tree
    kept = [json.loads(line) for line in (tmp_path / "grown.refused.jsonl").read_text().splitlines()]
    assert [row["proposal"]["title"] for row in kept] == ["the cat", "Castles!", "hamster"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["grown.refused.jsonl", "grown.yaml"]


def test_what_one_node_was_given_another_is_refused():
    found = extend(small(), Scripted([proposals("Kennels"), proposals("The kennel", "Barns")]))
    assert [label.id for label in found.added] == ["a.pets.kennels", "b.old.barns"]
    assert [(refused.at, refused.reason) for refused in found.refused] == [
        ("b.old", "duplicate: 'The kennel' is 'Kennels'")
    ]


def test_a_branch_comes_whole_or_not_at_all():
    leaf = {"title": "Trams", "about": "On rails."}
    branch = {"title": "Rail", "about": "Rails.", "children": [leaf]}
    top = {"title": "Transport", "about": "Moving.", "children": [branch]}
    again = {"title": "Traffic", "about": "Moving.", "children": [{**branch, "title": "Roads", "children": [leaf]}]}
    answer = json.dumps({"proposals": [top, {**top, "children": []}, leaf, again]})
    found = extend(small(), Scripted([answer]), at=[""])
    assert [label.id for label in found.added] == ["transport", "transport.rail", "transport.rail.trams"]
    assert found.tree.path("transport.rail.trams")[0] == "transport"
    reasons = [refused.reason for refused in found.refused]
    assert "$.children" in reasons[0]
    assert "'children' is a required property" in reasons[1]
    assert "'Trams' is 'Trams'" in reasons[2]


GARBAGE = [
    ("I would add hamsters.", "not JSON"),
    (proposals("Hamsters") + " Here you are.", "not JSON"),
    ("[]", "not as the schema has it, at \\$"),
    (proposals("Hamsters", extra=1), "extra"),
    ('{"proposals": [], "proposals": []}', "a name stands twice in 'proposals, proposals'"),
    ('{"proposals": NaN}', "NaN is not JSON"),
    ("[" * 100_000, "not JSON"),
    ("x" * (2**20 + 1), "too long"),
    (TeacherError("status 429 after 5 tries"), "no answer: status 429 after 5 tries"),
    ('{"proposals": [{"title": "Hamsters"}]}', "'about' is a required property"),
    ('{"proposals": [{"title": " ", "about": "x"}]}', "\\$.title"),
    ('{"proposals": [{"title": "?!", "about": "x"}]}', "of letters"),
    ('{"proposals": [{"title": "A\\u0000B", "about": "x"}]}', "control characters"),
    ('{"proposals": [{"title": "Bats", "about": "\\ud800"}]}', "control characters"),
    ('{"proposals": [{"title": "Bats", "about": "x", "id": "../etc"}]}', "Additional properties"),
    (f'{{"proposals": [{{"title": "{"B" * 81}", "about": "x"}}]}}', "too long"),
    ('{"proposals": [7]}', "7 is not of type 'object'"),
]


@pytest.mark.parametrize(("answer", "reason"), GARBAGE)
def test_garbage_adds_nothing_and_is_kept_with_its_reason(answer, reason, tmp_path):
    tree = small()
    found = extend(tree, Scripted([answer]), at=["a.pets"])
    assert found.tree is tree
    assert found.added == ()
    (refused,) = found.refused
    assert refused.at == "a.pets"
    assert re.search(reason, refused.reason), refused.reason
    found.save(tmp_path / "t.yaml")
    assert json.loads((tmp_path / "t.refused.jsonl").read_text())["reason"] == refused.reason


def test_no_more_than_was_asked_for_and_ids_of_any_script():
    found = extend(small(), Scripted([proposals("猫の絵", "Größe", "Große", "Lizards")]), at=["a.pets"], most=3)
    ids = [label.id for label in found.added]
    assert len(ids) == len(set(ids)) == 3
    assert all(id.startswith("a.pets.") and id.isascii() for id in ids)
    assert found.refused[0].reason == "more than the 3 that were asked for"
    cached = extend(small(), Scripted([Reply(proposals("Newts"), 7, 3, cached=True)]), at=["a.pets"])
    assert (len(cached.added), cached.prompt_tokens, cached.completion_tokens) == (1, 0, 0)


def test_where_a_tree_can_be_extended():
    with pytest.raises(LabelError, match=r"'a.pets.cats' is a leaf"):
        extend(small(), Scripted([]), at=["a.pets.cats"])
    with pytest.raises(LabelError, match="no label 'x'"):
        extend(small(), Scripted([]), at=["x"])
    with pytest.raises(LabelError, match="asked about 2 times"):
        extend(small(), Scripted([]), at=["a", "a"])
    with pytest.raises(RuntimeError, match="gave 0 answers to 1 requests"):
        extend(small(), Scripted([]), at=["a"])


def test_leaves_are_held_against_their_quotas():
    counts = {"a.pets.cats": 80, "a.pets.dogs": 5, "b.old.castle": 5}
    found = balance(small(), counts)
    assert [(share.leaf, share.count, share.quota, share.state) for share in found.shares] == [
        ("a.pets.cats", 80, 30, "over"),
        ("a.pets.dogs", 5, 30, "under"),
        ("b.old.castle", 5, 30, "under"),
    ]
    assert found.extension is None
    weighed = balance(small(), counts, quotas={"a.pets.cats": 8, "a.pets.dogs": 1})
    assert [share.quota for share in weighed.shares] == [72, 9, 9]
    assert {share.state for share in weighed.shares} == {"within"}
    assert [share.state for share in balance(small(), {}).shares] == ["within"] * 3
    none_wanted = balance(small(), {"a.pets.cats": 1}, quotas={"a.pets.cats": 0})
    assert none_wanted.over[0].leaf == "a.pets.cats"
    with pytest.raises(LabelError, match="no label 'dogs'"):
        balance(small(), {}, quotas={"dogs": 1})
    with pytest.raises(ValueError, match="low and high"):
        balance(small(), {}, high=0.5)


def test_full_leaves_are_split_beside_themselves():
    counts = {"a.pets.cats": 80, "a.pets.dogs": 5, "b.old.castle": 5}
    teacher = Scripted([proposals("Persian cats", "House cats", "Cats")])
    found = balance(small(), counts, teacher)
    assert found.extension is not None
    assert found.extension.parts == {"a.pets.cats": ("a.pets.persian-cats", "a.pets.house-cats")}
    assert set(small().leaves) < set(found.extension.tree.leaves)
    assert len(teacher.asked) == 1
    assert "'Cats' (Cats.) holds too much" in teacher.asked[0][1]["content"]
    one = balance(small(), counts, Scripted([proposals("Persian cats", "cats")])).extension
    assert one is not None
    assert one.parts == {}
    assert [refused.reason[:13] for refused in one.refused] == ["duplicate: 'c", "the only part"]
    even = balance(small(), dict.fromkeys(small().leaves, 3), Scripted([])).extension
    assert even is not None
    assert even.tree == small()


def test_labels_can_be_retitled():
    tree = small()
    renamed = replace(tree, labels=tuple(replace(label, about="Other.") for label in tree.labels))
    assert renamed != tree
    assert renamed.leaves == tree.leaves
    assert yaml.safe_load(renamed.to_yaml())["labels"][0]["about"] == "Other."
