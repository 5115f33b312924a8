"""docs/models.md from what the tests know: `python -m tests.pipeline.models_page` writes it, test_models_page.py checks it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from pipeline.families.door import ACTIVATIONS, Door
from pipeline.tasks.fixed_step import why_not_fixed
from pipeline.weights.quantised import QUANTISED
from tests.pipeline.family_table import NOT_SERVED, NOT_WRITING
from tests.pipeline.tiny_families import SEEING, architecture, families, tiny_config

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models

Written by `python -m tests.pipeline.models_page`; tests/pipeline/test_models_page.py checks that it is up to date. Every line is a
test of tests/pipeline/test_families.py: a tiny random checkpoint of the family, saved with the names that its published ones have,
is served from disk with slots for 30 % of its experts. *Exact*: in float32 every logit is within 1e-5 x max(1, largest logit) of
transformers' own, `from_pretrained` on the same files. *Writes*: the greedy tokens are those of its `generate`.

transformers {version} routes the experts of {count} families through one door, `ALL_EXPERTS_FUNCTIONS`; **{exact} of them are exact
and {writing} write**. Vision and audio towers are backbone: models that have them are served on text. The class is the one that was
tested; tested as well, on text: {seeing}.

Checkpoints are read as published: safetensors in one file or in shards, experts one by one or fused, float32, bfloat16 or float16;
{quantised} are dequantised into the arena. Other quantised formats are refused.

| family | class | experts | exact | writes |
|---|---|---|---|---|
"""
TAIL = """
Two more keep their own routers and a module per expert (tests/pipeline/test_encoder_decoders.py):

| family | class | experts | exact | writes |
|---|---|---|---|---|
| switch_transformers | SwitchTransformersForConditionalGeneration | no gate | yes | yes |
| nllb_moe | NllbMoeForConditionalGeneration | no gate, bias | yes, see below | yes, see below |

NLLB-MoE is compared with what its router says and not with transformers {version}, whose experts' forward takes the router's mask
for expert numbers and uses experts 0 and 1 only; a test fails when that is mended.

On a GPU the same kernels serve all of them but those with a norm after each expert, which are refused there; gates that are none of
{activations} run as torch operators between two kernels. A GPU has been tested with Switch
Transformers, Qwen3-MoE, Mixtral, gpt-oss, DeepSeek-V2 and OLMoE (tests/pipeline/test_decoding_on_gpu.py), and timed with the first
two.

A step of {fixed} of the families that write can be recorded there, as far as a CPU can tell: the step that would be recorded writes
the same tokens (tests/pipeline/test_fixed_step.py). A GPU has recorded those of the five just named. The others'
run eagerly:

{eager}
"""


def page() -> str:
    names = families()
    served = [name for name in names if name not in NOT_SERVED]
    version = transformers.__version__
    head = HEAD.format(
        version=version,
        count=len(names),
        exact=len(served),
        writing=len([name for name in served if name not in NOT_WRITING]),
        seeing=", ".join(SEEING.values()),
        quantised=" and ".join(method.upper() for method in QUANTISED),
    )
    reasons = {name: _why_not_fixed(name) for name in served if name not in NOT_WRITING}
    tail = TAIL.format(
        version=version,
        activations=", ".join(sorted(set(ACTIVATIONS.values()))),
        fixed=sum(reason is None for reason in reasons.values()),
        eager="\n".join(
            f"* {reason}: {', '.join(name for name in reasons if reasons[name] == reason)}"
            for reason in sorted({reason for reason in reasons.values() if reason is not None})
        ),
    )
    return head + "\n".join(_line(name) for name in names) + "\n" + tail


def _line(family: str) -> str:
    cls = architecture(family)
    exact = f"no: {NOT_SERVED[family]}" if family in NOT_SERVED else "yes"
    writes = "no" if family in NOT_SERVED else f"no: {NOT_WRITING[family]}" if family in NOT_WRITING else "yes"
    return f"| {family} | {cls.__name__} | {'' if family in NOT_SERVED else _experts(family)} | {exact} | {writes} |"


def _why_not_fixed(family: str) -> str | None:
    with torch.device("meta"):
        return why_not_fixed(architecture(family)(tiny_config(architecture(family).config_class)))


def _experts(family: str) -> str:
    """The flags that transformers sets on the family's experts, and whether it has a gate of its own."""
    with torch.device("meta"):
        model = architecture(family)(tiny_config(architecture(family).config_class))
    names = [name for name, module in model.named_modules() if Door().find(model, name, module)]
    module = model.get_submodule(names[0])
    words = ["gate" if module.has_gate else "no gate"]
    words += ["own gate"] if "_apply_gate" in vars(type(module)) and type(module)._apply_gate.__module__ != _DEFAULT else []
    words += ["interleaved"] if not module.is_concatenated else []
    words += ["transposed"] if module.is_transposed else []
    words += ["bias"] if module.has_bias else []
    words += ["norm after each"] if module.has_post_expert_norm else []
    return ", ".join(words[1:] if words[:2] == ["gate", "own gate"] else words)


_DEFAULT = "transformers.integrations.moe"

if __name__ == "__main__":
    PAGE.write_text(page())
