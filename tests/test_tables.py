"""The paper's table: which columns, in which form, with what beside them."""

from dd_jax.results.published import Figures
from dd_jax.results.tables import COLUMNS, Row, fgsm_name, has_published, markdown_table, text_table

FIRST = Row(
    "reference",
    {"accuracy": 0.98765, "l2": 1.0, "epsilon_half": None, "pass": 0.91239},
    Figures(0.81, 0.054),
)
SECOND = Row("deep_defense", {"accuracy": 1.0, "l2": 10.25, fgsm_name(0.5): 0.25}, None)


def test_columns_that_nobody_measured_are_left_out_and_what_one_lacks_is_a_dash():
    assert text_table([FIRST, SECOND]).splitlines() == [
        "              accuracy            l_2  acc. FGSM 0.5 ref    PASS",
        "reference       98.77%  1.000 (0.810)                  -  0.9124",
        "deep_defense   100.00%         10.250             25.00%       -",
    ]
    assert has_published([FIRST, SECOND]) and not has_published([SECOND])
    # The paper says nothing of that.
    assert not has_published([Row("x", {"accuracy": 0.5}, Figures(0.81, 0.054))])


def test_markdown_has_the_same_cells():
    text, markdown = text_table([FIRST, SECOND]), markdown_table([FIRST, SECOND]).splitlines()
    assert markdown[1] == "| --- | ---: | ---: | ---: | ---: |"
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (markdown[0], *markdown[2:])
    ]
    assert [" ".join(line).split() for line in cells] == [
        line.split() for line in text.splitlines()
    ]


def test_every_figure_of_the_paper_has_its_column():
    assert {column.published for column in COLUMNS if column.published} == set(Figures._fields)
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)
