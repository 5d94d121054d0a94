"""Sequential merges of whole models against a plain reference in float64, and the laws that they keep."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import transformers
from torch import nn

from bmm_engine import collect_grams, collect_sequential, merge, merge_sequential
from bmm_engine.errors import CollectionError, ConfigError, EmptyCalibrationError, NonFiniteGramError
from tests.numerics import relative_error
from tests.reference_merge import linear_names
from tests.reference_sequential import reference_sequential, stream_beside, trace
from tests.tiny import CONFIGS, family, fine_tune, make_base, make_batches

ARCHITECTURES = list(CONFIGS)
HEADS = ("classifier", "lm_head", "score")


def double(batches):
    return [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]


def problem(architecture, experts=2):
    """Experts that differ in how far they are from the base, and calibration for each."""
    base = make_base(architecture)
    tuned = [fine_tune(base, seed + 1, 0.05 * (1 + seed)) for seed in range(experts)]
    return base, tuned, [make_batches(architecture, 10 + t) for t in range(experts)]


def body(tensors):
    return {k: v for k, v in tensors.items() if v.is_floating_point() and not k.startswith(HEADS)}


def assert_close(found, truth, tolerance):
    truth = truth.state_dict() if isinstance(truth, nn.Module) else truth
    for name, tensor in body(truth).items():
        assert relative_error(found[name], tensor) < tolerance, name


WALKS = {
    "defaults": {},
    "plain": {"fit_bias": False, "energy": False, "alpha": 0.01},
    "scaled": {"scale": 0.7, "alpha": 1.0},
    "section 7": {"target": "module"},
    "means": {"mean_weight": 10.0},
    "measured alone": {"task_vector_samples": 0.0},
    "sweeps": {"sweeps": 2},
    "norms": {"norms": True},
}
# What does not depend on the kind of network.
ONCE = {
    "gpt2": {"frobenius": {"energy": "frobenius", "norms": True}},
    "bert": {"a share of drift": {"drift": 0.3, "norms": True}},
    "vit": {"no drift": {"drift": 0.0, "target": "module", "fit_bias": False}},
    "llama": {"overshot": {"prior": 2.0, "alpha": 0.3, "sweeps": 2, "norms": True}},
}


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        pytest.param(options, architecture, id=f"{name}-{architecture}")
        for architecture in ARCHITECTURES
        for name, options in (WALKS | ONCE[architecture]).items()
    ],
)
def test_it_is_the_formula_walked_through_the_network(architecture, options):
    base, experts, batches = problem(architecture)
    truth = reference_sequential(base, experts, [double(b) for b in batches], **options)
    given = {k: v for k, v in options.items() if k not in ("energy", "norms")}
    given["task_weights"] = {True: "energy", False: None}.get(options.get("energy", True), "frobenius")
    given["norms"] = "fit" if options.get("norms") else "anchor"
    wide = [copy.deepcopy(m).double() for m in (base, *experts)]
    assert_close(merge_sequential(wide[0], wide[1:], [double(b) for b in batches], **given).tensors, truth, 1e-9)
    assert_close(merge_sequential(base, experts, batches, **given).tensors, truth, 1e-4)


LAST = {  # modules of the last block whose rows are weighed: all but keys, values and what gives them too
    "bert": r"layer\.1\.(.*query|.*dense)$",
    "vit": r"layers\.1\.(.*q_proj|.*o_proj|mlp.*)$",
    "llama": r"layers\.1\.(.*q_proj|.*o_proj|mlp.*)$",
    "gpt2": r"h\.1\.(.*c_proj|mlp.*)$",
}


@pytest.mark.parametrize(
    ("architecture", "kind", "options"),
    [
        ("bert", "cls", {}),
        ("vit", "cls", {"mean_weight": 5.0, "fit_bias": False}),
        ("gpt2", "last", {"mean_weight": 5.0, "fit_bias": False}),
        ("llama", "last", {}),
    ],
    ids=str,
)
def test_the_token_that_is_read_counts_most_in_the_last_block(architecture, kind, options):
    base, experts, batches = problem(architecture)
    own, wide = [double(b) for b in batches], [copy.deepcopy(m).double() for m in (base, *experts)]
    tokens = {"modules": LAST[architecture], "rows": {"kind": kind, "weight": 0.05}}
    truth = reference_sequential(base, experts, own, tokens=tokens, **options)
    found = merge_sequential(wide[0], wide[1:], own, token_rows=kind, token_weight=0.05, **options)
    assert_close(found.tensors, truth, 1e-9)
    plain = reference_sequential(base, experts, own, **options).state_dict()
    touched = {
        n for n in linear_names(base) if relative_error(found.tensors[f"{n}.weight"], plain[f"{n}.weight"]) > 1e-6
    }
    weighed = {n for n in linear_names(base) if re.search(LAST[architecture], n)}
    assert weighed <= touched
    assert all(".1." in n or "pooler" in n for n in touched)


def test_rows_that_count_alike_are_all_rows():
    base, experts, batches = problem("llama")
    equal = {"token_rows": "last", "token_weight": 1.0, "token_blocks": 9, "task_vector_samples": 0}
    # Energy weights are those of modules that are solved together, and queries are solved apart here.
    found = merge_sequential(base, experts, batches, **equal, task_weights=None).tensors
    plain = merge_sequential(base, experts, batches, task_vector_samples=0, task_weights=None).tensors
    assert_close(found, {name: tensor.double() for name, tensor in body(plain).items()}, 1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("count", [1, 2])
def test_one_expert_or_equal_ones_come_back(architecture, count):
    base, experts, batches = problem(architecture)
    same = [copy.deepcopy(experts[1]) for _ in range(count)]
    result = merge_sequential(base, same, batches[:count], norms="fit")
    assert_close(result.tensors, copy.deepcopy(experts[1]).double(), 1e-6)
    assert max(r for record in result.inputs for r in record.after) < 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_data_alone_lead_from_the_base_to_the_expert(architecture):
    """The anchor is the base, the ridge next to nothing: every linear module and every normalisation is found again."""
    base = make_base(architecture).double()
    expert = fine_tune(base, 2, 0.1)
    solved = {m for m in linear_names(base)} | {n for n, m in base.named_modules() if "Norm" in type(m).__name__}
    own = {k: v for k, v in base.state_dict().items() if k.rpartition(".")[0] not in solved}
    expert.load_state_dict({**expert.state_dict(), **own})
    far = {"anchor": "task_arithmetic", "anchor_parameters": {"scaling": 0.0}}
    inputs = [double(make_batches(architecture, 20, 12))]
    result = merge_sequential(base, [expert], inputs, **far, alpha=1e-12, norms="fit")
    merged = copy.deepcopy(base)
    merged.load_state_dict(
        {**expert.state_dict(), **{k: v for k, v in result.tensors.items() if not k.startswith(HEADS)}}
    )
    # Not tensor by tensor: what a LayerNorm gives is linearly dependent, so that other weights may do the same.
    with torch.no_grad():
        for batch in inputs[0]:
            found, truth = (model(**batch).logits for model in (merged, expert))
            assert relative_error(found, truth) < 1e-4
    assert min(r for record in result.inputs for r in record.before if r is not None) > 0.1
    assert max(r for record in result.inputs for r in record.after if r is not None) < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fit_bias", [False, True])
def test_without_drift_it_is_plain_bmm(architecture, fit_bias):
    """Experts that differ in linear modules of the last block only: until there nothing drifts, nor does that block's first input."""
    base, (first, second), batches = problem(architecture)
    last = max(
        int(n.split(".")[i]) for n in linear_names(base) for i in range(len(n.split("."))) if n.split(".")[i].isdigit()
    )
    for expert in (first, second):
        linear = tuple(f"{n}." for n in linear_names(base) if f".{last}." in n)
        own = {k: v for k, v in base.state_dict().items() if not k.startswith(linear)}
        expert.load_state_dict({**expert.state_dict(), **own})
    experts = [first, second]
    grams = [collect_grams(e, b) for e, b in zip(experts, batches)]
    plain = merge(base, experts, grams=grams, task_weights="energy", fit_bias=fit_bias)
    walked = merge_sequential(base, experts, batches, fit_bias=fit_bias, task_vector_samples=0)
    at = next(i for i, r in enumerate(walked.inputs) if r.stage.endswith(f".{last}"))
    for name in walked.inputs[at].modules:
        assert relative_error(walked.tensors[f"{name}.weight"], plain.tensors[f"{name}.weight"].double()) < 1e-5, name
    assert all(r.before == (None, None) == r.after for r in walked.inputs[:at])  # nothing was changed there
    later = [n for r in walked.inputs[at + 1 :] for n in r.modules if f".{last}." in n]
    differ = [relative_error(walked.tensors[f"{n}.weight"], plain.tensors[f"{n}.weight"].double()) for n in later]
    assert max(differ) > 1e-4


def test_a_share_of_zero_is_the_target_of_regmean_plusplus():
    """Where the experts' blocks still read what the merged one reads: at the first input of the first block, which has drifted since embeddings are
    merged."""
    base, experts, batches = problem("bert")
    wide, own = [copy.deepcopy(m).double() for m in (base, *experts)], [double(b) for b in batches]
    rule = {"shrink": 1.0, "ridge": 0.03}
    grams = collect_sequential(wide[0], wide[1:], own, **rule)
    truth = merge(wide[0], wide[1:], anchor="regmean_plusplus", anchor_parameters=rule, grams=grams, alpha=math.inf)
    options = {"task_weights": None, "fit_bias": False, "task_vector_samples": 0, "alpha": 0.03}
    none, all_of_it = (merge_sequential(wide[0], wide[1:], own, drift=a, **options) for a in (0.0, 1.0))
    names = none.inputs[0].modules
    assert len(names) == 3
    for name in names:
        key = f"{name}.weight"
        assert relative_error(none.tensors[key], truth.tensors[key]) < 1e-9
        assert relative_error(all_of_it.tensors[key], truth.tensors[key]) > 1e-3


def test_an_infinite_ridge_is_the_anchor_and_any_anchor_will_do():
    base, experts, batches = problem("bert")
    for anchor in ("average", "ties", "tsv_m"):
        own = merge(base, experts, anchor=anchor, alpha=math.inf).tensors
        found = merge_sequential(base, experts, batches, anchor=anchor, alpha=math.inf, prior=2.0, norms="fit").tensors
        assert all(torch.equal(found[n], own[n]) for n in own)
        truth = reference_sequential(base, experts, [double(b) for b in batches], anchor=own)
        assert_close(merge_sequential(base, experts, batches, anchor=anchor).tensors, truth, 1e-4)
    grams = [collect_grams(e, b) for e, b in zip(experts, batches)]
    own = merge(base, experts, anchor="regmean", grams=grams, alpha=math.inf).tensors
    truth = reference_sequential(base, experts, [double(b) for b in batches], anchor=own)
    assert_close(merge_sequential(base, experts, batches, anchor="regmean", grams=grams).tensors, truth, 1e-4)
    with pytest.raises(ConfigError, match="needs measured Grams"):
        merge_sequential(base, experts, batches, anchor="regmean")


def test_ridges_and_scales_may_vary_over_the_model():
    base, experts, batches = problem("llama")
    alpha = [{"filter": "q_proj", "value": 10.0}, {"filter": "mlp", "value": math.inf}, {"value": 0.1}]
    # Task vectors are those of the modules that are solved together, which differ here.
    result = merge_sequential(base, experts, batches, alpha=alpha, task_vector_samples=0)
    own = merge(base, experts, alpha=math.inf).tensors
    assert all(torch.equal(result.tensors[n], own[n]) for n in own if "mlp" in n)
    first = [r for r in result.inputs if r.stage == "model.layers.0"]
    assert [(r.alpha, [m.split(".")[-1] for m in r.modules]) for r in first] == [
        (10.0, ["q_proj"]),
        (0.1, ["k_proj", "v_proj"]),
        (0.1, ["o_proj"]),
    ]
    assert first[0].task_weights != first[1].task_weights  # each group has weights of its own
    at_once = merge_sequential(base, experts, batches, alpha=10.0, task_vector_samples=0).tensors
    name = "model.layers.0.self_attn.q_proj.weight"
    assert relative_error(result.tensors[name], at_once[name].double()) < 1e-2


def test_the_order_of_the_experts_does_not_matter_to_a_bit():
    base, experts, batches = problem("gpt2", 3)
    one = merge_sequential(base, experts, batches, task_weights=[1.0, 2.0, 3.0])
    other = merge_sequential(base, experts[::-1], batches[::-1], task_weights=[3.0, 2.0, 1.0])
    assert all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)
    for a, b in zip(one.inputs, other.inputs):
        assert a.after == b.after[::-1]
        assert a.task_weights == b.task_weights[::-1]


@pytest.mark.parametrize("target", ["module", "stream"])
def test_it_says_what_it_lowered(target):
    """The residual that is recorded is that of the rows themselves; solving lowers what is minimised, of which they are all here."""
    base, experts, batches = problem("bert")
    alone = {"task_vector_samples": 0, "task_weights": None}
    result = merge_sequential(base, experts, batches, alpha=1e-3, target=target, **alone)
    merged = copy.deepcopy(base)
    merged.load_state_dict({**merged.state_dict(), **result.tensors})
    anchor = merge(base, experts, alpha=math.inf).tensors
    written = [0.0] * len(experts)
    for record in result.inputs:
        name = record.modules[0]
        if len(record.modules) > 1 or record.stage == "after the blocks":
            continue
        for t, expert in enumerate(experts):
            x, y = trace(expert, batches[t], [name])[name]
            drifted, _ = trace(merged, batches[t], [name])[name]
            beside = [stream_beside(m, batches[t], name) for m in (merged, expert)]
            assert record.stream == (target == "stream" and beside[0] is not None)
            shift = beside[0] - beside[1] if record.stream else 0.0
            linear = {
                k: (s[f"{name}.weight"], s[f"{name}.bias"])
                for k, s in (("anchor", anchor), ("solved", result.tensors), ("base", base.state_dict()))
            }
            change = (y - nn.functional.linear(x, *linear["base"])).norm()
            assert record.change[t] == pytest.approx(float(change) ** 2 / len(x), rel=1e-3)
            if record.stream:
                written[t] += float(change) ** 2
                change = written[t] ** 0.5
            for recorded, key in ((record.before, "anchor"), (record.after, "solved")):
                true = (nn.functional.linear(drifted, *linear[key]) - y + shift).norm() / change
                assert abs(recorded[t] - float(true)) < 2e-3 * float(true) + 1e-4, (name, key)
        assert sum(v**2 for v in record.after) <= sum(v**2 for v in record.before) * 1.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpoints_and_live_models_give_the_same(architecture, tmp_path):
    base, experts, base_path, paths = family(architecture, tmp_path)
    batches = [make_batches(architecture, 10 + t) for t in range(2)]
    live = merge_sequential(base, experts, batches, norms="fit")
    read = merge_sequential(base_path, paths, batches, norms="fit", output=tmp_path / "out")
    assert read.path == tmp_path / "out"
    assert not (tmp_path / "out.walk").exists()
    cls = type(base)
    again = cls.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in live.tensors.items():
        assert torch.equal(again[name], tensor), name
    assert [r.after for r in read.inputs] == [r.after for r in live.inputs]


def test_hidden_states_find_room_in_memory_or_on_disk_to_the_same_bits(tmp_path):
    base, experts, batches = problem("llama")
    whole = merge_sequential(base, experts, batches).tensors
    for memory in (0, 3000, "20KB"):
        found = merge_sequential(base, experts, batches, hidden_memory=memory).tensors
        assert all(torch.equal(whole[n], found[n]) for n in whole), memory
    half = merge_sequential(base, experts, batches, hidden_dtype="bfloat16", hidden_memory=0).tensors
    errors = [relative_error(half[n], whole[n].double()) for n in body(whole)]
    assert 0 < max(errors) < 0.05


class Mixer(nn.Module):
    """A block that gives a tensor, changes its input in place, and calls one of its modules twice."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.token, self.channel = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x):
        x += 0.1
        x = x + torch.tanh(self.token(self.norm(x)))
        return x + self.channel(torch.relu(self.channel(x)))


class TimmLike(nn.Module):
    """As timm names things: `blocks` is a Sequential, called as a whole; projections before and after them."""

    def __init__(self, width=6, depth=3):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.Sequential(*(Mixer(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        return self.out(self.norm(self.blocks(self.embed(x))))


def test_any_model_that_is_a_sequence_of_blocks_can_be_walked():
    torch.manual_seed(0)
    base = TimmLike().double()
    experts = [fine_tune(base, seed + 1, 0.1) for seed in range(2)]
    batches = [[torch.randn(5, 7, 4, dtype=torch.float64) for _ in range(2)] for _ in range(2)]
    # Random weights have random task vectors, which say nothing of the inputs.
    options = {"mask": None, "norms": "fit", "blocks": "blo*", "task_vector_samples": 0}
    result = merge_sequential(base, experts, batches, **options)
    stages = list(dict.fromkeys(r.stage for r in result.inputs))
    assert stages == ["before the blocks", "blocks.0", "blocks.1", "blocks.2", "after the blocks"]
    assert {n for r in result.inputs for n in r.modules} == set(linear_names(base)) | {
        n for n, m in base.named_modules() if isinstance(m, nn.LayerNorm)
    }
    merged = copy.deepcopy(base)
    merged.load_state_dict(result.tensors)
    mean = copy.deepcopy(base)
    mean.load_state_dict(merge(base, experts, alpha=math.inf, modules=["*"]).tensors)

    @torch.no_grad()
    def miss(model):
        return sum(float((model(b.clone()) - e(b.clone())).norm()) for e, own in zip(experts, batches) for b in own)

    assert miss(merged) < 0.95 * miss(mean)


def test_bad_inputs_are_refused(tmp_path):
    base, experts, batches = problem("bert")
    for text, error, options in (
        ("2 experts and 1 calibration", ConfigError, {"batches": batches[:1]}),
        ("expert 1: its calibration set is empty", EmptyCalibrationError, {"batches": [batches[0], []]}),
        ("sweeps = 0: .*greater than or equal to 1", ConfigError, {"sweeps": 0}),
        ("norms = 'all': .*'anchor' or 'fit'", ConfigError, {"norms": "all"}),
        (r"drift = 1\.5: .*less than or equal to 1", ConfigError, {"drift": 1.5}),
        ("mean_weight = -1.0: .*greater than or equal to 0", ConfigError, {"mean_weight": -1.0}),
        ("task_vector_samples = inf: .*finite", ConfigError, {"task_vector_samples": math.inf}),
        ("target = 'sum': .*'stream' or 'module'", ConfigError, {"target": "sum"}),
        ("unknown key 'sweep'; did you mean 'sweeps'", ConfigError, {"sweep": 2}),
        ("hidden_memory = 'much': size 'much' is not", ConfigError, {"hidden_memory": "much"}),
        (r"blocks: .* that matches 'decoder\*'", ConfigError, {"blocks": "decoder*"}),
        ("no config.json", ConfigError, {"base": base.state_dict(), "modules": ["*attention*"]}),
    ):
        given = {"base": base, "experts": experts, "batches": batches, **options}
        with pytest.raises(error, match=text):
            merge_sequential(given.pop("base"), given.pop("experts"), given.pop("batches"), **given)
    broken = copy.deepcopy(experts[0])
    with torch.no_grad():
        broken.bert.embeddings.word_embeddings.weight[5:9] = math.inf
    with pytest.raises(NonFiniteGramError, match=r"layer\.0.*rows of the expert there hold NaN"):
        merge_sequential(base, [broken, experts[1]], batches, keep_base=["bert.embeddings.word*"])
    spare = copy.deepcopy(base)
    spare.spare = nn.Linear(3, 3)
    tuned = [copy.deepcopy(spare) for _ in range(2)]
    with pytest.raises(CollectionError, match=r"never called.*'spare'"):
        merge_sequential(spare, tuned, batches, modules=["spare", "*query*"])
    for model in (base, *experts):
        assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 60}
OTHERS = {
    # Relative position biases that the first block makes, from a parameter of its own, and hands on.
    "t5": lambda: (
        transformers.T5EncoderModel,
        transformers.T5Config(d_model=16, d_kv=4, d_ff=40, num_layers=2, num_heads=4, vocab_size=60),
    ),
    # Gains as 1 + w; sliding and full attention in turns.
    "gemma2": lambda: (
        transformers.Gemma2Model,
        transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=4, sliding_window=16),
    ),
    # Attention and MLP side by side, on two normalisations of one input.
    "gpt_neox": lambda: (transformers.GPTNeoXModel, transformers.GPTNeoXConfig(**SMALL, use_parallel_residual=True)),
    "qwen2": lambda: (transformers.Qwen2Model, transformers.Qwen2Config(**SMALL, num_key_value_heads=2)),
    "distilbert": lambda: (
        transformers.DistilBertModel,
        transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=4, hidden_dim=40, vocab_size=60),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_walked_with_what_their_own_blocks_do(name, tmp_path):
    torch.manual_seed(0)
    cls, config = OTHERS[name]()
    base = cls(config).eval().double()
    expert = fine_tune(base, 2, 0.1)
    solved = {n for n, m in base.named_modules() if isinstance(m, nn.Linear) or "Norm" in type(m).__name__}
    own = {k: v for k, v in base.state_dict().items() if k.rpartition(".")[0] not in solved}
    expert.load_state_dict({**expert.state_dict(), **own})
    base.save_pretrained(tmp_path / "base")
    batches = make_batches("llama", 20, 16)
    far = {"anchor": "task_arithmetic", "anchor_parameters": {"scaling": 0.0}, "walk_dtype": "float64"}
    result = merge_sequential(tmp_path / "base", [expert.state_dict()], [batches], **far, alpha=1e-12, norms="fit")
    merged = copy.deepcopy(base)
    merged.load_state_dict({n: result.tensors.get(n, t) for n, t in merged.state_dict().items()})
    with torch.no_grad():
        for batch in batches[:3]:
            found, truth, start = (m(**batch).last_hidden_state for m in (merged, expert, base))
            keep = batch["attention_mask"].bool()
            assert relative_error(found[keep], truth[keep]) < 1e-4
            assert relative_error(start[keep], truth[keep]) > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_that_cast_nothing_themselves_run_on_hidden_states_of_another_dtype(dtype):
    base, experts, batches = problem("bert")
    whole = merge_sequential(base, experts, batches).tensors
    half = merge_sequential(base, experts, batches, hidden_dtype=dtype).tensors
    assert 0 < max(relative_error(half[n], whole[n].double()) for n in body(whole)) < 0.05
