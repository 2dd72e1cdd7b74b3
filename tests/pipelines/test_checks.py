import pytest

from ldm.errors import UserError
from pipelines.checks import check_at_once, check_count, check_pair, check_prompt, check_scale, check_size


def test_what_is_good_comes_back():
    assert check_prompt("prompt", "a cat") == ["a cat"]
    assert check_prompt("prompt", ["a cat", "кот 🐈"]) == ["a cat", "кот 🐈"]
    assert check_prompt("negative_prompt", "", may_be_empty=True) == [""]
    assert check_count("steps", 1) == 1 and check_count("level", 0, smallest=0, largest=0) == 0
    assert check_scale("scale", 0) == 0.0 and check_scale("scale", 7.5) == 7.5
    assert check_size("height", 64, 8) == 64
    assert check_pair("original_size", [3, 4]) == (3, 4)


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True, float("nan"), 11])
def test_a_count_is_a_whole_number_in_its_range(value):
    with pytest.raises(UserError, match="it must be a whole number from 1 to 10"):
        check_count("steps", value, largest=10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, "3", None, True])
def test_a_scale_is_finite_and_not_negative(value):
    with pytest.raises(UserError, match="it must be a finite number >= 0"):
        check_scale("scale", value)


@pytest.mark.parametrize("value", [3, (3,), (3, 0), "34", (1.5, 2)])
def test_a_pair_is_two_whole_numbers(value):
    with pytest.raises(UserError, match=r"original_size is|whole number >= 1"):
        check_pair("original_size", value)


@pytest.mark.parametrize(("value", "nearest"), [(1, 8), (30, 32), (33, 32), (63, 64)])
def test_a_size_is_told_its_nearest(value, nearest):
    with pytest.raises(UserError, match=f"the nearest is {nearest}$"):
        check_size("height", value, 8)


@pytest.mark.parametrize("value", ["", "\t", [], [""], ["a", None], 3, b"a cat", {"a"}, "\ud800"])
def test_a_prompt_is_text(value):
    with pytest.raises(UserError) as caught:
        check_prompt("prompt", value)
    assert str(caught.value).startswith("prompt ") and "\n" not in str(caught.value)


def test_no_more_pictures_at_once_than_memory_may_hold():
    assert check_at_once("num_images_per_prompt", 10_000, 1, (32, 32)) == 10_000
    assert check_at_once("num_images_per_prompt", 32, 8, (512, 512)) == 32
    with pytest.raises(UserError, match="of 8 prompts; pictures of 512×512 pixels are made together, at most 256"):
        check_at_once("num_images_per_prompt", 33, 8, (512, 512))
    with pytest.raises(UserError, match="num_frames is 10001; embeddings are made together, at most 10000"):
        check_at_once("num_frames", 10_001)
