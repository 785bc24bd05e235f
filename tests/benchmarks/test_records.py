import common
import records
from records import by_machine, newest, record


def test_a_quick_look_is_recorded_only_in_a_folder_of_its_own(results, monkeypatch):
    record("made_up", {"value": 1}, quick=True)
    record("made_up", {"value": 2}, quick=False)
    assert [row["value"] for row in common.rows("made_up")] == [1, 2]
    assert {row["session"] for row in common.rows("made_up")} == {records.SESSION}
    monkeypatch.setattr(common, "HERE", results.parent)  # now these are the committed ones
    record("made_up", {"value": 3}, quick=True)
    record("made_up", {"value": 4}, quick=False)
    assert [row["value"] for row in common.rows("made_up")] == [1, 2, 4]


def test_rows_of_machines_that_differ_in_anything_stay_apart(head):
    heads = [head(), head(device="small"), head(threads=1), head(torch="3"), head(side_by_side=2)]
    assert by_machine([*heads, head(date="later")]) == [
        ("", [heads[0], head(date="later")]), ("-2", [heads[1]]), ("-3", [heads[2]]), ("-4", [heads[3]]),
        ("-5", [heads[4]]),
    ]  # fmt: skip


def test_the_newest_session_counts_for_each_value_of_a_key():
    found = [
        {"width": 1, "session": "a", "of": 1},
        {"width": 1, "session": "b", "of": 2},
        {"width": 2, "session": "a", "of": 3},
        {"width": 1, "session": "b", "of": 4},
    ]
    assert [row["of"] for row in newest(found, "width")] == [2, 3, 4]
    assert [row["of"] for row in newest(found)] == [2, 4]
    without = [{"width": 1, "of": 5}, {"width": 1, "of": 6}]
    assert newest(without, "width") == without
    assert newest([*without, found[0]], "width") == [found[0]]
