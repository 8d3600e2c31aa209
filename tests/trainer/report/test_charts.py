"""Charts."""

from recpress.trainer.report.charts import Chart, Lines, Series


def test_a_logarithmic_axis_has_round_ticks_in_the_words_of_its_unit(tmp_path):
    panel = Lines(
        x_label="Seconds", y_label="y", series=[Series(label="a", x=[1, 30], y=[0, 1])], log_x=True,
        format_x=lambda value: f"{value:g} sec",
    )  # fmt: skip
    text = Chart(title="", caption="", panels=[panel]).svg("c")
    assert "Seconds (log scale)" in text
    assert [f">{tick} sec<" in text for tick in (1, 2, 5, 10, 20, 3)] == [True, True, True, True, True, False]
