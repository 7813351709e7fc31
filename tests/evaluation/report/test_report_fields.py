"""The report's tables and figures by what the corpus knows about a position."""

from __future__ import annotations

from hand_made import position, run

from rpt_lightning.evaluation.report.figures import all_figures
from rpt_lightning.evaluation.report.page import json_for_script
from rpt_lightning.evaluation.report.tables import field_tables
from sample_results import results


def validated(name, *rows):
    return run(
        name,
        validations=[
            results(
                *(
                    position(f"{chr(97 + k)}{k}", 1.0, right, ntp, fields=known)
                    for k, (right, ntp, known) in enumerate(rows)
                )
            )
        ],
    )


ONE = validated(
    "one", (True, False, {"depth": 10}), (True, False, {"depth": 2}),
    (False, True, {"depth": 2, "world": "<b>"}), (True, True, None)
)  # fmt: skip
TWO = validated("two", (None, True, {"depth": 2}), (None, False, {"depth": 4}))


def test_a_table_a_field_with_a_row_a_value():
    depth, world = field_tables(ONE)
    assert depth.caption == "one at step 7, by depth, 3 positions that have it"
    assert depth.columns[:3] == ["depth", "positions", "by reasoning"]
    assert [row[:2] for row in depth.rows] == [["2", "2"], ["10", "1"]]
    assert depth.rows[0][2:4] == ["50.0 % [9.5, 90.5] 1/2"] * 2
    assert depth.rows[1][4].startswith("+100.0 points")
    assert [row[0] for row in world.rows] == ["<b>"]
    assert field_tables(run("none")) == []
    assert field_tables(TWO)[0].caption == "two at step 7, by depth"
    assert field_tables(TWO)[0].rows[0][2] == "not measured"


def field_figures(*runs):
    return [
        figure
        for figure in all_figures(runs, {one.name: {} for one in runs})
        if "Accuracy by " in figure.title and "difficulty" not in figure.title
    ]


def test_a_figure_of_each_numeric_field():
    (figure,) = field_figures(ONE, TWO)
    assert (figure.section, figure.title) == ("accuracy", "Accuracy by depth, at each run's last validation")
    by_name = {trace["name"]: trace for trace in figure.spec["data"]}
    assert list(by_name) == ["one, reasoning", "one, NTP", "two, NTP"]
    assert (by_name["one, reasoning"]["x"], by_name["one, reasoning"]["y"]) == ([2, 10], [50.0, 100.0])
    assert by_name["one, NTP"]["customdata"][1] == "0.0 % [0.0, 79.3] 0/1"
    assert (by_name["two, NTP"]["x"], by_name["two, NTP"]["y"]) == ([2, 4], [100.0, 0.0])
    assert by_name["two, NTP"]["meta"] == {"run": 1}
    json_for_script(figure.spec)
    assert field_figures(run("none")) == field_figures(validated("text", (True, True, {"world": "a"}))) == []


def test_ranges_stand_side_by_side():
    many = validated("many", *((k % 2 == 0, False, {"<depth>": k}) for k in range(24)))
    (figure,) = field_figures(many)
    assert figure.spec["layout"]["xaxis"]["type"] == "category"
    assert figure.spec["layout"]["xaxis"]["title"]["text"] == "&lt;depth&gt;"
    assert figure.spec["data"][0]["x"] == ["0 to 3", "4 to 7", "8 to 11", "12 to 15", "16 to 19", "20 to 23"]
    assert figure.spec["data"][0]["y"] == [50.0] * 6
