import pytest

from experiments.readme import README, RESULTS, replace_section, table7, ttft


def test_sections_are_replaced_between_their_marks():
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n"
    assert replace_section(text, "x", "new\n") == text.replace("old", "new")
    with pytest.raises(ValueError, match="no section 'y'"):
        replace_section(text, "y", "")


def test_the_gpu_table_of_the_readme_is_what_the_results_say():
    folder = max(RESULTS.glob("h*_*"), key=lambda path: path.name.rpartition("_")[2])
    assert table7(folder) in README.read_text()
    assert ttft(folder) in README.read_text()
