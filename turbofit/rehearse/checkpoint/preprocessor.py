"""``preprocessor_config.json`` of header-only checkpoints."""

from __future__ import annotations

from turbofit.core.json_types import JsonObject
from turbofit.rehearse.checkpoint.dims import RehearsedModel, Vision

__all__ = ["preprocessor_of"]


def preprocessor_of(model: RehearsedModel) -> JsonObject:
    """The ``preprocessor_config.json`` of a model with a vision tower."""
    assert model.vision is not None
    if model.vision.kind.startswith("internvit"):
        return _internvit(model, model.vision)
    if model.vision.kind == "moonvit":
        return {
            "media_proc_cfg": {
                "patch_size": model.vision.patch,
                "merge_kernel_size": 2,
                "in_patch_limit": model.max_patches,
                "patch_limit_on_one_side": 512,
            }
        }
    patches: JsonObject = {"patch_size": model.vision.patch, "merge_size": 2}
    patches["temporal_patch_size"] = 2
    if model.vision.kind == "qwen3":
        patches |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    if model.vision.audio is not None:
        kind = "Qwen2_5Omni" if model.vision.kind == "qwen2_5" else "Qwen3OmniMoe"
        return patches | {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": f"{kind}Processor",
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": model.vision.audio.mel_bins,
            "min_pixels": 3136,
            "max_pixels": 12845056,
        }
    if model.vision.kind == "qwen3":
        return patches | {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        }
    return patches | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _internvit(model: RehearsedModel, vision: Vision) -> JsonObject:
    normal: JsonObject = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if vision.kind == "internvit_hf":
        return normal | {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": model.max_tiles,
            "size": {"height": vision.image, "width": vision.image},
        }
    return normal | {
        "image_processor_type": "CLIPFeatureExtractor",
        "crop_size": vision.image,
        "size": vision.image,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
    }
