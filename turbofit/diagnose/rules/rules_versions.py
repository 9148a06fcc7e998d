"""Errors of packages that do not go together: Transformers, LMDeploy, the checkpoint's own code."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.struct import Struct
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.diagnose.rules.tried_versions import tried_versions
from turbofit.observe.turbomind_log import PythonError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.facts import LogEvent

__all__ = ["is_of_versions", "version_rules"]

#: The package, not the engine.
_TRANSFORMERS: Final = "transformers"
_DICT: Final = re.compile(r"'dict' object has no attribute '(\w+)'")
#: What a model's configuration has, as far as public logs miss it in a plain dict.
_OF_CONFIG: Final = re.compile(
    r"architectures|model_type|to_dict|hidden_size|image_size|vocab_size|num_\w+|\w*config\w*"
    r"|_?attn_implementation\w*|torch_dtype|max_position_embeddings"
)
_CONFIG: Final = re.compile(r"'(\w+Config)' object has no attribute '(\w+)'")
_MODEL: Final = re.compile(
    r"'(\w*(?:Model|ForCausalLM|ForConditionalGeneration|Processor|Tokenizer\w*|Cache))' object has"
    r" no attribute '(\w+)'"
)
_NOTHING: Final = re.compile(
    r"'NoneType' object has no attribute"
    r" '(image_processor|feature_extractor|tokenizer|image_token\w*)'"
)
_IMPORT: Final = re.compile(
    r"cannot import name '(\w+)' from '(transformers|lmdeploy|accelerate|huggingface_hub|tokenizers"
    r"|peft|vllm|sglang|qwen_vl_utils)[\w.]*'"
)
_KEYWORD: Final = re.compile(r"(\S+) got an unexpected keyword argument '(\w+)'")
_AXES: Final = re.compile(r"size of tensor a \(\d+\) must match the size of tensor b \(3\) at")
#: Folders of the packages whose versions must go together, and of checkpoints' own code.
_FOLDERS: Final = re.compile(r"[/\\](transformers|lmdeploy|vllm|sglang)[/\\]|transformers_modules")
#: Names that Transformers 5 no longer has (transformers#45278, VLMEvalKit#1675).
_GONE_IN_5: Final = ("AutoModelForVision2Seq", "HybridCache")


_REQUIRED: Final = (
    'pip install "transformers==VERSION" with transformers_version of the checkpoint\'s'
    " config.json, or the version that the program's requirements name",
)
_DICTS: Final = "'dict' object has no attribute"
_INTERNVL: Final = (
    'pip install "transformers<4.52", for InternVL with code of its own (lmdeploy#3786), or take'
    " its checkpoint in Hugging Face's format (…-hf): LMDeploy 0.18 asks for 4.56 or newer"
)


class _Fault(Struct):
    """What does not go together, why, and the lines that mend it."""

    what: str
    why: str
    changes: tuple[str, ...]


def version_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """Errors of Python that come from versions."""
    for mark, error in case.facts.every(PythonError):
        fault = _fault(mark, error, case)
        if fault is not None:
            yield RuleAnswer(
                kind="package_versions",
                phase="configuration",
                what=fault.what,
                line=mark.line,
                why=(fault.why,),
                changes=fault.changes,
                evidence=(evidence(mark, "the traceback's last line"),),
                unknown=("which versions are installed: `pip list` says it, or `turbofit doctor`",),
            )


def is_of_versions(mark: LogEvent, error: PythonError) -> bool:
    """Whether an error says that packages do not go together."""
    return _fault(mark, error, None) is not None


def _fault(mark: LogEvent, error: PythonError, case: LogCase | None) -> _Fault | None:
    text, name = error.message, error.name.rpartition(".")[2]
    inside = any(_FOLDERS.search(frame.path) for frame in mark.stack)
    lmdeploy = case is not None and case.facts.subject.lmdeploy
    if name == "AttributeError":
        if (match := _DICT.search(text)) and (inside or _OF_CONFIG.fullmatch(match[1])):
            return _plain_config(match[1], case)
        if match := _CONFIG.search(text):
            update = ("pip install -U lmdeploy",) if lmdeploy else ()
            return _old_reader(match[1], match[2], (*update, *_pinned(case, match[0])))
        if match := _MODEL.search(text):
            return _other_class(match[1], match[2], _pinned(case, match[0]))
        if match := _NOTHING.search(text):
            return _no_processor(match[1], _pinned(case, match[0]))
    if name == "ImportError" and (match := _IMPORT.search(text)):
        return _gone(match[1], match[2], tried_versions(case, match[0]))
    if name == "TypeError" and inside and (match := _KEYWORD.search(text)):
        return _Fault(
            what=f"{match[1]} takes no argument {match[2]}: caller and package are of different"
            " versions",
            why="the program was written for another version of the package that it calls",
            changes=_pinned(case, text),
        )
    if name == "RuntimeError" and _AXES.search(text) and _in_llava_front_end(mark):
        return _axes(case)
    return None


def _plain_config(attribute: str, case: LogCase | None) -> _Fault:
    """A configuration inside the model's stayed what JSON says, since its class was not found."""
    model = case.model.hub_id if case is not None and case.model is not None else None
    return _Fault(
        what=f"a configuration inside the model's stayed a plain dict, which has no {attribute}",
        why="the class that reads this checkpoint's configuration was not used: its own code could"
        " not be imported under the installed transformers, or misses in the folder, and a general"
        " class took the JSON as it is",
        changes=(
            'python -c "from transformers import AutoConfig;'
            f" AutoConfig.from_pretrained('{model or 'MODEL'}', trust_remote_code=True)\" shows the"
            " error behind it",
            "pip install -U lmdeploy timm einops (lmdeploy#2124: a new environment mended it)",
            *(tried_versions(case, _DICTS) or (_INTERNVL,)),
        ),
    )


def _old_reader(config: str, attribute: str, changes: tuple[str, ...]) -> _Fault:
    return _Fault(
        what=f"the engine reads {attribute} where {config} has none: it does not know this kind of"
        " configuration",
        why="the program is older than the model, or of another time than the installed"
        " transformers, which keeps that attribute elsewhere (image models: in text_config or"
        " llm_config)",
        changes=changes,
    )


def _other_class(owner: str, attribute: str, versions: tuple[str, ...]) -> _Fault:
    return _Fault(
        what=f"{owner} has no {attribute}: the program expects another version or format of it",
        why="a checkpoint in Hugging Face's format (…-hf) and one with code of its own have"
        " different classes, and Transformers removes what it had called old",
        changes=(
            "take the format of the checkpoint that the program names (with or without -hf)",
            *versions,
        ),
    )


def _no_processor(attribute: str, versions: tuple[str, ...]) -> _Fault:
    return _Fault(
        what=f"the model's processor was not loaded, so that it has no {attribute}",
        why="a program that catches the error of AutoProcessor goes on without one; most often the"
        " installed transformers does not know this model's processor, or its files miss",
        changes=(
            'python -c "from transformers import AutoProcessor;'
            " AutoProcessor.from_pretrained('MODEL')\" shows the error behind it",
            *versions,
        ),
    )


def _gone(name: str, package: str, tried: tuple[str, ...]) -> _Fault:
    changes = tried or _REQUIRED
    if package != _TRANSFORMERS:
        changes = (f"pip install the version of {package} that the program's requirements name",)
    elif name in _GONE_IN_5 and not tried:
        changes = ('pip install "transformers<5"',)
    return _Fault(
        what=f"the installed {package} has no {name}: it is older or newer than the program needs",
        why="names come and go between versions; the program was written for another one",
        changes=changes,
    )


def _pinned(case: LogCase | None, error: str) -> tuple[str, ...]:
    """The version to install, or how to find it."""
    return tried_versions(case, error) or _REQUIRED


def _in_llava_front_end(mark: LogEvent) -> bool:
    return any("llava_hf.py" in frame.path for frame in mark.stack)


def _axes(case: LogCase | None) -> _Fault:
    family = "LlavaForConditionalGeneration"
    tried = tried_versions(case, "must match the size of tensor b (3)", family)
    return _Fault(
        what="LMDeploy's front end for LLaVA-1.5 fails at every image with Transformers 5",
        why="it says of a PIL image that its channels come last, after Transformers has put them"
        " first; columns are taken for channels",
        changes=tried or ('pip install "transformers<5"',),
    )
