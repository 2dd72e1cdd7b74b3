import itertools

import numpy as np
import pytest

from ldm.data import shapes


def test_a_scene_depends_on_its_seed_and_index_alone():
    first = [shapes.make_scene(7, i) for i in range(50)]
    again = [shapes.make_scene(7, i) for i in reversed(range(50))][::-1]
    assert first == again
    assert first != [shapes.make_scene(8, i) for i in range(50)]
    assert np.array_equal(np.asarray(shapes.draw(first[0])), np.asarray(shapes.draw(again[0])))


def test_captions_read_back_as_the_scene_they_were_written_from():
    for i in range(300):
        scene = shapes.make_scene(0, i)
        parsed = shapes.parse(scene.caption)
        assert parsed.where == scene.where
        assert [o.words for o in parsed.objects] == [o.words for o in scene.objects]


@pytest.mark.parametrize("image_size", [32, 64])
def test_reader_is_right_on_clean_scenes(image_size):
    scenes = [shapes.make_scene(1, i) for i in range(2000)]
    right = [shapes.compare(shapes.draw(s, image_size), s.caption) for s in scenes]
    assert np.mean([bool(r) and r.size for r in right]) >= 0.99


def test_reader_refuses_mismatched_captions():
    scenes = [shapes.make_scene(2, i) for i in range(400)]
    wrong = []
    for a, b in itertools.pairwise(scenes):
        same_but_size = a.caption.replace("small", "").replace("large", "") == b.caption.replace("small", "").replace(
            "large", ""
        )
        if not same_but_size:
            wrong.append(shapes.matches(shapes.draw(a), b.caption))
    assert len(wrong) > 350
    assert not any(wrong)


def test_reader_refuses_one_changed_word():
    scene = next(s for i in range(99) if len((s := shapes.make_scene(3, i)).objects) == 2 and s.where == "left of")
    image, caption = shapes.draw(scene), scene.caption
    first, second = (o.words for o in scene.objects)
    assert shapes.matches(image, caption)
    assert not shapes.matches(image, f"{second} left of {first}")
    for shape in shapes.SHAPES:
        changed = caption.replace(scene.objects[0].shape, shape)
        assert shapes.matches(image, changed) == (changed == caption)


def test_held_out_captions_are_about_a_tenth():
    captions = {shapes.make_scene(0, i).caption for i in range(5000)}
    held = np.mean([shapes.is_held_out(c) for c in captions])
    assert 0.07 < held < 0.13


def test_a_caption_of_another_kind_is_an_error_that_quotes_it():
    with pytest.raises(ValueError, match="a photo of a cat"):
        shapes.parse("a photo of a cat")
