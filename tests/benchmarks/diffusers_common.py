"""Diffusers' own common tests of a pipeline, run against every pipeline of this package.

    python tests/benchmarks/diffusers_common.py --diffusers CHECKOUT [--only NAME]

CHECKOUT: a checkout of Diffusers' repository of the installed version, whose `tests/` the wheel does not hold. Only
`tests/pipelines/test_pipelines_common.py`, `pipeline_params.py` and what they import are read. Components are the tiny
random ones of `tests/pipelines/conftest.py`, and so are those of the repository that one test opens: a cache of the
Hub's is filled with them, and nothing is downloaded. Prints a line a pipeline and why a test does not apply; exits with
1 where one fails. Tests of an accelerator are skipped where there is none.
"""

import importlib
import io
import os
import runpy
import sys
import tempfile
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

OTHER_LAYOUT = (
    "without its optional components a model is of StableDiffusionPipeline's layout, whose U-Net reads no image "
    "embedding: tested there"
)
FRAMES = {
    "test_inference_batch_consistent": "its output are the frames of one way, not one image an input",
    "test_inference_batch_single_identical": "the same",
    "test_pt_np_pil_outputs_equivalent": "it compares the first picture with all, and there are several",
}
BESIDE = {
    "test_serialization_with_variants": "model_index.json does not name the image tower, which lies beside the "
    "components: stock StableUnCLIPPipeline has none",
}
OPTIONAL = "test_save_load_optional_components"
NEEDED = "needs what the test leaves out, and says so"
NOT_FOR = {
    "TextToImage": {OPTIONAL: OTHER_LAYOUT},
    "ImageToImage": {OPTIONAL: OTHER_LAYOUT},
    "Inpaint": {OPTIONAL: OTHER_LAYOUT},
    "Variation": {OPTIONAL: NEEDED, **BESIDE},
    "Interpolation": {OPTIONAL: OTHER_LAYOUT, **BESIDE, **FRAMES},
    "TextDiff": {
        OPTIONAL: NEEDED,
        "test_encode_prompt_works_in_isolation": "its texts make a direction between embeddings; none stands for them",
        **BESIDE,
        **FRAMES,
    },
    "Prior": {OPTIONAL: NEEDED},
}
"""Tests that do not apply, and why."""

REPOSITORY = "hf-internal-testing/tiny-stable-diffusion-pipe"


def fill_cache(cache: Path) -> None:
    """Puts a `StableDiffusionPipeline` where the Hub's client keeps what it has downloaded of REPOSITORY."""
    from diffusers import StableDiffusionPipeline

    folder, commit = cache / f"models--{REPOSITORY.replace('/', '--')}", "0" * 40
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    components = {name: part for name, part in without_prior(None).items() if part is not None}
    StableDiffusionPipeline(**components, **checker).save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def without_prior(_: object) -> dict:
    """Components in the layout of `StableDiffusionPipeline`; those of a prior are None."""
    import torch
    from diffusers import UNet2DConditionModel

    parts = runpy.run_path(str(ROOT / "tests" / "pipelines" / "conftest.py"))
    found = parts["components"]()
    unread = ("class_embed_type", "projection_class_embeddings_input_dim")
    config = {k: v for k, v in found["unet"].config.items() if not k.startswith("_") and k not in unread}
    torch.manual_seed(0)
    own = {"unet": UNet2DConditionModel(**config).eval()}
    own["text_encoder"] = parts["CLIPTextModel"](found["text_encoder"].config).eval()
    own |= {k: found[k] for k in ("vae", "tokenizer", "scheduler")}
    rest = ("prior_tokenizer", "prior_text_encoder", "prior", "prior_scheduler", "image_normalizer",
            "image_noising_scheduler")  # fmt: skip
    return own | dict.fromkeys(rest)


def cases(common: Any, params: Any) -> dict[str, type[unittest.TestCase]]:
    """Name -> what Diffusers' mixins ask for: a pipeline, its parameters, components and inputs."""
    import numpy as np
    import torch
    from PIL import Image

    import pipelines

    parts = runpy.run_path(str(ROOT / "tests" / "pipelines" / "conftest.py"))
    steps = {"num_inference_steps": 3, "output_type": "np"}
    text = {"prompt": "A painting of a squirrel eating a burger", **steps}
    prior = {"prior_num_inference_steps": 2}
    ramp = np.linspace(0, 1, 16, dtype=np.float32)
    picture = torch.from_numpy(np.stack(np.broadcast_arrays(ramp, ramp[:, None], 0.5), axis=0)[None].astype("float32"))
    mask = Image.fromarray(np.repeat([[0] * 8 + [255] * 8], 16, axis=0).astype(np.uint8))

    def with_prior(images: bool = False) -> Callable[[Any], dict]:
        def components(_) -> dict:
            found = parts["components"]()
            found["prior_text_encoder"] = found["text_encoder"]
            found["prior_tokenizer"] = found["tokenizer"]
            found["text_encoder"] = parts["CLIPTextModel"](found["prior_text_encoder"].config).eval()
            tower = {"image_encoder": found.pop("image_encoder"), "feature_extractor": found.pop("image_processor")}
            return found | tower if images else found

        return components

    def case(kind: str, components: Callable, inputs: dict, wanted: frozenset, batched: frozenset, mixins=(), **own):
        def get_dummy_inputs(self, device, seed=0):
            generator = torch.Generator("cpu").manual_seed(seed)
            return {k: list(v) if isinstance(v, list) else v for k, v in inputs.items()} | {"generator": generator}

        def test_encode_prompt_works_in_isolation(self):
            guided = {"device": "cpu", "do_classifier_free_guidance": True}
            common.PipelineTesterMixin.test_encode_prompt_works_in_isolation(self, guided)

        members = {
            "pipeline_class": getattr(pipelines, f"LatentDiffusion{kind}Pipeline"),
            "get_dummy_components": components,
            "get_dummy_inputs": get_dummy_inputs,
            "params": wanted,
            "batch_params": batched,
            "callback_cfg_params": params.TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS,
            "image_params": frozenset({"image"} & set(inputs)),
            "image_latents_params": frozenset(),
            "test_encode_prompt_works_in_isolation": test_encode_prompt_works_in_isolation,
            **own,
        }
        return (*mixins, common.PipelineTesterMixin, unittest.TestCase), members

    def no_pixels(self):  # as Diffusers' own priors are tested
        self._test_attention_slicing_forward_pass(test_mean_pixel_difference=False)

    drawing = (common.PipelineLatentTesterMixin, common.PipelineKarrasSchedulerTesterMixin)
    sharing = (*drawing, common.PipelineFromPipeTesterMixin)
    to_image, to_batch = params.TEXT_TO_IMAGE_PARAMS, params.TEXT_TO_IMAGE_BATCH_PARAMS
    redraw, inpaint = params.TEXT_GUIDED_IMAGE_VARIATION_PARAMS, params.TEXT_GUIDED_IMAGE_INPAINTING_PARAMS
    redraw_batch = params.TEXT_GUIDED_IMAGE_VARIATION_BATCH_PARAMS
    inpaint_batch = params.TEXT_GUIDED_IMAGE_INPAINTING_BATCH_PARAMS
    no_latents = common.PipelineTesterMixin.required_optional_params - {"latents"}
    one_way = common.PipelineTesterMixin.required_optional_params - {"num_images_per_prompt"}
    image, masked = {"image": picture}, {"image": picture, "mask_image": mask}
    tokens = frozenset({"image_embeds", "height", "width", "guidance_scale", "negative_prompt"})
    ends = {**steps, **prior, "prompt": ["a cat", "a dog"], "num_frames": 3}
    diff = {**steps, **image, "prompt": "a dog", "num_frames": 3}
    kinds = {
        "TextToImage": case("", with_prior(), text | prior, to_image, to_batch, drawing),
        "TextToImageWithoutPrior": case("", without_prior, text, to_image, to_batch, sharing),
        "ImageToImage": case("Img2Img", with_prior(), text | prior | image, redraw, redraw_batch, drawing,
                             required_optional_params=no_latents),
        "ImageToImageWithoutPrior": case("Img2Img", without_prior, text | image, redraw, redraw_batch, sharing,
                                         required_optional_params=no_latents),
        "Inpaint": case("Inpaint", with_prior(), text | prior | masked, inpaint, inpaint_batch, drawing),
        "InpaintWithoutPrior": case("Inpaint", without_prior, text | masked, inpaint, inpaint_batch, sharing),
        "Variation": case("Variation", with_prior(True), text | image, redraw, redraw_batch, drawing),
        "Interpolation": case("Interpolation", with_prior(True), ends, to_image, frozenset(), drawing,
                              required_optional_params=one_way),
        "TextDiff": case("TextDiff", with_prior(True), diff, tokens | {"prompt", "image"}, frozenset(), drawing,
                         required_optional_params=one_way),
        "Prior": case("Prior", with_prior(), text, frozenset({"prompt", "guidance_scale"}), frozenset({"prompt"}),
                      test_attention_slicing_forward_pass=no_pixels),
    }  # fmt: skip
    return {name: type(name, bases, members) for name, (bases, members) in kinds.items()}


def _reason_to_skip(test: unittest.TestCase) -> str:
    """What the test's pytest marks say, which unittest does not read; "" if nothing."""
    for mark in getattr(getattr(test, test._testMethodName), "pytestmark", []):
        if mark.name == "skip" or (mark.name == "skipif" and mark.args[0]):
            return mark.kwargs.get("reason", "skipped")
    return ""


def run(name: str, case: type[unittest.TestCase]) -> bool:
    """Prints a line, and those of failures; whether there is none."""
    left_out = NOT_FOR.get(name, {})
    tests = [case(test) for test in unittest.TestLoader().getTestCaseNames(case) if test not in left_out]
    skipped = [(test, why) for test in tests if (why := _reason_to_skip(test))]
    suite = unittest.TestSuite(test for test in tests if not _reason_to_skip(test))
    result = unittest.TextTestRunner(io.StringIO(), verbosity=0).run(suite)
    bad = result.failures + result.errors
    passed = result.testsRun - len(bad) - len(result.skipped)
    skipped += result.skipped
    print(f"{name}: {passed} passed, {len(bad)} failed, {len(skipped)} skipped, {len(left_out)} do not apply")
    for test, trace in bad:
        print(f"  FAILED {test._testMethodName}\n{trace}")
    for test, why in skipped:
        print(f"  skipped {test._testMethodName}: {why}")
    for test, why in left_out.items():
        print(f"  does not apply: {test}: {why}")
    sys.stdout.flush()
    return not bad


def main() -> bool:
    """Whether every test that applies has passed."""
    from pipelines.arguments import ArgumentParser

    parser = ArgumentParser(description="Diffusers' common pipeline tests, against this package.")
    parser.add_argument("--diffusers", metavar="CHECKOUT", required=True, help="of the installed version")
    parser.add_argument("--only", metavar="NAME", help="of one pipeline, as a former run names it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1"}  # read when the client is imported
        fill_cache(Path(cache))
        return run_all(Path(arguments.diffusers).expanduser().resolve(), arguments.only)


def run_all(checkout: Path, only: str | None) -> bool:
    sys.path.insert(0, str(checkout))
    common = importlib.import_module("tests.pipelines.test_pipelines_common")
    params = importlib.import_module("tests.pipelines.pipeline_params")

    import diffusers.pipelines

    import pipelines

    for name in pipelines.__all__:  # one of the tests looks for the class there
        setattr(diffusers.pipelines, name, getattr(pipelines, name))
    warnings.simplefilter("ignore")
    passed = [run(name, case) for name, case in cases(common, params).items() if only in (None, name)]
    return all(passed)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
