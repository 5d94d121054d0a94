"""Task heads are known as such in every class of transformers that has one: built on the meta device, by default configs."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import transformers

from bmm_engine import merge
from bmm_engine.models.architecture import is_head, linear_module, linear_modules
from tests.tiny import fine_tune, save

transformers.logging.set_verbosity_error()

# Class -> its linear modules that are heads. Those without `base_model` within, and each form of a head.
HEADS = {
    "CLIPForImageClassification": {"classifier"},
    "MetaClip2ForImageClassification": {"classifier"},
    "SiglipForImageClassification": {"classifier"},
    "Siglip2ForImageClassification": {"classifier"},
    "T5ForQuestionAnswering": {"qa_outputs"},
    "UMT5ForQuestionAnswering": {"qa_outputs"},
    "WhisperForAudioClassification": {"projector", "classifier"},
    "HGNetV2ForImageClassification": {"fc"},
    "PPLCNetForImageClassification": {"head"},
    "Dinov2ForImageClassification": {"classifier"},
    "ViTForImageClassification": {"classifier"},
    "BeitForImageClassification": {"classifier"},
    "SwinForImageClassification": {"classifier"},
    "ConvNextForImageClassification": {"classifier"},
    "DeiTForImageClassificationWithTeacher": {"cls_classifier", "distillation_classifier"},
    "BertForSequenceClassification": {"classifier"},
    "BertForNextSentencePrediction": {"cls.seq_relationship"},
    "BertForMultipleChoice": {"classifier"},
    "BertForQuestionAnswering": {"qa_outputs"},
    "BertForMaskedLM": {"cls.predictions.transform.dense", "cls.predictions.decoder"},
    "RobertaForSequenceClassification": {"classifier.dense", "classifier.out_proj"},
    "DebertaV2ForTokenClassification": {"classifier"},
    "DistilBertForSequenceClassification": {"pre_classifier", "classifier"},
    "AlbertForQuestionAnswering": {"qa_outputs"},
    "ElectraForSequenceClassification": {"classifier.dense", "classifier.out_proj"},
    "T5ForSequenceClassification": {"classification_head.dense", "classification_head.out_proj"},
    "T5ForTokenClassification": {"classifier"},
    "BartForSequenceClassification": {"classification_head.dense", "classification_head.out_proj"},
    "GPT2ForSequenceClassification": {"score"},
    "LlamaForSequenceClassification": {"score"},
    "MixtralForTokenClassification": {"score"},
    "Qwen2ForQuestionAnswering": {"qa_outputs"},
    "Wav2Vec2ForSequenceClassification": {"projector", "classifier"},
    "Wav2Vec2ForAudioFrameClassification": {"classifier"},
    "HubertForCTC": {"lm_head"},
    "TimesformerForVideoClassification": {"classifier"},
    "LlamaForCausalLM": {"lm_head"},
    "CLIPVisionModelWithProjection": {"visual_projection"},
    "EncoderDecoderModel": {"decoder.cls.predictions.transform.dense", "decoder.cls.predictions.decoder"},
    "ShieldGemma2ForImageClassification": {"model.lm_head"},
    # What is not a head although it stands beside, or at the end of, something.
    "CLIPModel": set(),
    "AltCLIPModel": set(),
    "BertModel": set(),
    "T5EncoderModel": set(),
}
_TASK = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)$")
# Their heads are no linear modules: parameters of the class itself, or convolutions.
_OTHERS = {"TapasForQuestionAnswering", "SegformerForImageClassification"}


def built(name: str) -> torch.nn.Module:
    """With few layers and small tables: only names matter."""
    cls = getattr(transformers, name)
    config = cls.config_class()
    if name == "EncoderDecoderModel":
        own = transformers.BertConfig(num_hidden_layers=1)
        config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(own, own)
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for key in ("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers", "num_layers"):
            if type(getattr(part, key, None)) is int and getattr(part, "layer_types", None) is None:
                setattr(part, key, 1)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return cls(config)


def heads_of(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if linear_module(name, module) and is_head(name, model)}


@pytest.mark.parametrize("name", sorted(HEADS))
def test_heads(name: str) -> None:
    model = built(name)
    assert heads_of(model) == HEADS[name]
    assert HEADS[name].isdisjoint(linear_modules(model))
    assert (
        not hasattr(model, "base_model_prefix")
        or linear_modules(model)
        or name in ("HGNetV2ForImageClassification", "PPLCNetForImageClassification")
    )


@pytest.mark.slow
@pytest.mark.skipif("not config.getoption('markexpr')", reason="all classes: pytest -m slow")
def test_every_class_of_a_task_has_its_head() -> None:
    names = [n for n in dir(transformers) if _TASK.search(n) and not n.startswith(("Auto", "DataCollator"))]
    headless, tried = [], 0
    for name in names:
        cls = getattr(transformers, name)
        try:
            model = built(name)
        except Exception:  # of a library that is not installed, or a config that has no defaults
            continue
        tried += 1
        head = [
            n
            for n, m in model.named_modules()
            if linear_module(n, m) and (linear_module(n, m).out_features == getattr(model.config, "num_labels", 2))
        ]
        found = heads_of(model)
        if not found and name not in _OTHERS and head:
            headless.append(cls.__name__)
    assert tried > 300
    assert headless == []


def test_the_head_of_a_clip_classifier_is_the_anchors(tmp_path) -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.CLIPConfig(vision_config=vision, num_labels=3)
    base = transformers.CLIPForImageClassification(config).eval()
    experts = [fine_tune(base, seed) for seed in (1, 2)]
    result = merge(base, experts, progress=False)
    mean = torch.stack([e.classifier.weight.detach().double() for e in experts]).mean(0)
    torch.testing.assert_close(result.tensors["classifier.weight"].double(), mean, rtol=1e-6, atol=1e-7)
    assert "classifier.weight" in result.plan.from_anchor
    assert len(result.modules) == 6
    # The same from files.
    paths = [save(m, tmp_path / n) for m, n in ((base, "base"), (experts[0], "one"), (experts[1], "two"))]
    written = merge(paths[0], paths[1:], progress=False)
    assert "classifier.weight" in written.plan.from_anchor
    assert torch.equal(written.tensors["classifier.weight"], result.tensors["classifier.weight"])
