"""Claims about a graph: each holds of a good graph, fails at the named node of a bad one, and stops a pipeline there."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from artifact.errors import FusionError
from graphs import contract, passes
from graphs.contract import Claim, check_claims
from graphs.pipeline import PIPELINES, STATIC_PIPELINES

NORM = "g (float16[B,S,8] x, float16[8] w) => (float16[B,S,8] y) {{ y = RMSNormalization <axis={axis}, stash_type={stash}> (x, w) }}"
ROTATION = (
    "g (float16[B,4,S,8] x, {table}[9,4] c, {table}[9,4] s, int64[B,S] p) => (float16[B,4,S,8] y) {{ y = RotaryEmbedding {form} (x, c, s, p) }}"
)
ATTENTION = "g (float16[B,4,S,8] q, float16[B,2,T,8] k, {mask}[B,1,S,T] m) => (float16[B,4,S,8] y) {{ y = Attention {form} (q, k, k, m) }}"
LENGTHS = """g (float16[B,4,S,8] q, float16[B,2,T,8] k, bool[B,1,S,T] m, int64[B] n) => (float16[B,4,S,8] y)
{{ y = Attention <scale=1.0, is_causal={causal}> (q, k, k, {mask}, , , n) }}"""
REPEATED = """g (float16[B,4,S,8] q, float16[B,2,1,T,8] k, int64[5] e, int64[4] h) => (float16[B,4,S,8] y)
{ x = Expand(k, e) r = Reshape(x, h) y = Attention <scale=1.0> (q, r, r) }"""
RESHAPE = "g (float16[B,S,8] x{input}) => (float16[B,S,2,4] y) {{ {shape} y = Reshape {form} (x, h) }}"
SPLIT = """g (float16[B,S,8] x, float16[8,8] w) => (float16[B,S,8] a, float16[B,S,8] b)
{{ l = MatMul(x, w) a, b = Split <axis={axis}, num_outputs=2> (l) }}"""
CASES = {
    "norm-axis": (contract.NORMS_IN_FLOAT32, NORM.format(axis=-1, stash=1), NORM.format(axis=1, stash=1)),
    "norm-stash": (contract.NORMS_IN_FLOAT32, NORM.format(axis=2, stash=1), NORM.format(axis=-1, stash=10)),
    "table-dtype": (contract.ROTATIONS_BY_TABLE, ROTATION.format(table="float16", form=""), ROTATION.format(table="float", form="")),
    "table-dtype-of-pairs": (
        contract.ROTATIONS_TYPED,
        ROTATION.format(table="float16", form="<interleaved=1>"),
        ROTATION.format(table="float", form="<interleaved=1>"),
    ),
    "interleaved": (
        contract.ROTATIONS_BY_TABLE,
        ROTATION.format(table="float16", form="<interleaved=0>"),
        ROTATION.format(table="float16", form="<interleaved=1>"),
    ),
    "scale": (contract.ATTENTION_PLAIN, ATTENTION.format(mask="bool", form="<scale=1.0>"), ATTENTION.format(mask="bool", form="")),
    "softcap": (
        contract.ATTENTION_PLAIN,
        ATTENTION.format(mask="bool", form="<scale=1.0>"),
        ATTENTION.format(mask="bool", form="<scale=1.0, softcap=2.0>"),
    ),
    "mask": (contract.MASKS_BOOLEAN, ATTENTION.format(mask="bool", form=""), ATTENTION.format(mask="float16", form="")),
    "no-lengths": (contract.MASKED_BY_LENGTHS, LENGTHS.format(mask="", causal=1), ATTENTION.format(mask="bool", form="<is_causal=1>")),
    "mask-beside-lengths": (contract.MASKED_BY_LENGTHS, LENGTHS.format(mask="", causal=1), LENGTHS.format(mask="m", causal=1)),
    "not-causal": (contract.MASKED_BY_LENGTHS, LENGTHS.format(mask="", causal=1), LENGTHS.format(mask="", causal=0)),
    "repeated": (contract.HEADS_UNREPEATED, ATTENTION.format(mask="bool", form=""), REPEATED),
    "computed-shape": (
        contract.SHAPES_CONSTANT,
        RESHAPE.format(input="", shape="h = Constant <value_ints=[0, 0, 2, 4]> ()", form=""),
        RESHAPE.format(input=", int64[4] h", shape="", form=""),
    ),
    "zero-is-zero": (
        contract.SHAPES_CONSTANT,
        RESHAPE.format(input="", shape="h = Constant <value_ints=[0, 0, 2, 4]> ()", form="<allowzero=0>"),
        RESHAPE.format(input="", shape="h = Constant <value_ints=[0, 0, 2, 4]> ()", form="<allowzero=1>"),
    ),
    "sliced": (contract.LINEARS_UNSLICED, SPLIT.format(axis=1), SPLIT.format(axis=-1)),
}


def graph(text: str, opset: int = 23) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : {opset}]>\n{text}')
    for node in model.graph:
        node.name = f"the {node.op_type}"
    return model


@pytest.mark.parametrize("case", CASES)
def test_claim_holds_of_the_good_graph_and_names_the_node_of_the_bad_one(case) -> None:
    claim, good, bad = CASES[case]
    assert claim.broken_at(graph(good)) is None
    check_claims((claim,), graph(good), "some", "ensures")
    at_fault = list(graph(bad).graph)[-1].name
    with pytest.raises(FusionError, match=f"fusion some ensures that {claim.words}; this fails at {at_fault}"):
        check_claims((claim,), graph(bad), "some", "ensures")


def test_past_and_presents_are_not_plain_attention() -> None:
    past = ATTENTION.replace("m) }}", "m, k, k) }}").format(mask="bool", form="<scale=1.0>")
    assert contract.ATTENTION_PLAIN.broken_at(graph(past)) == "the Attention"


def test_an_older_opset_is_named() -> None:
    assert contract.OPSET_23.broken_at(graph(NORM.format(axis=-1, stash=1))) is None
    assert contract.OPSET_23.broken_at(graph(NORM.format(axis=-1, stash=1), opset=18)) == "opset 18"


def test_an_operand_of_another_graph_is_not_connected() -> None:
    model, other = graph(NORM.format(axis=-1, stash=1)), graph(SPLIT.format(axis=1))
    assert contract.CONNECTED.broken_at(model) is None
    next(iter(model.graph)).replace_input_with(0, next(iter(other.graph)).outputs[0])
    assert contract.CONNECTED.broken_at(model) == "the RMSNormalization"


def test_a_value_without_a_shape_is_not_typed() -> None:
    model = graph(NORM.format(axis=-1, stash=1))
    assert contract.TYPED.broken_at(model) is None
    next(iter(model.graph)).outputs[0].shape = None
    assert contract.TYPED.broken_at(model) == "the RMSNormalization"


@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_inside_the_graph_is_named(turned, tmp_path) -> None:
    text = "g (float[B,S,16] x, float[16,16] w) => (float[B,S,16] y) { t = Transpose <perm=[1, 0]> (w) y = MatMul(x, t) }"
    model = graph(text if turned else text.replace("t = Transpose <perm=[1, 0]> (w) y = MatMul(x, t)", "y = MatMul(x, w)"))
    weight = model.graph.inputs.pop()
    model.graph.initializers.add(weight)
    weight.const_value = ir.ExternalTensor("w.bin", 0, 1024, ir.DataType.FLOAT, shape=ir.Shape([16, 16]), name="w", base_dir=tmp_path)
    assert contract.WEIGHTS_OUTSIDE.broken_at(model) is None
    weight.const_value = ir.tensor([[0.0] * 16] * 16, name="w")
    assert contract.WEIGHTS_OUTSIDE.broken_at(model) == "the MatMul"


class Shape:
    num_hidden_layers = 0


class Idle:
    """A fusion file that finds nothing, or everything but its last candidate."""

    RULES = None

    @staticmethod
    def is_candidate(node: ir.Node) -> bool:
        return False


def run(monkeypatch, *, fired: int, requires=(), ensures=()) -> list[passes.RuleReport]:
    monkeypatch.setattr(passes, "apply_fusion", lambda *_: passes.FusionResult(fired))
    fusions = (passes.Fusion("first", Idle, lambda shape: 0), passes.Fusion("second", Idle, lambda shape: 0, requires=requires, ensures=ensures))
    return passes.run_passes(graph(NORM.format(axis=-1, stash=1)), fusions, Shape())


NEVER = Claim("nothing is so", lambda model: "any node")


@pytest.mark.parametrize("verb", ["requires", "ensures"])
def test_a_broken_claim_stops_the_pipeline_and_names_pass_and_node(monkeypatch, verb) -> None:
    with pytest.raises(FusionError, match=f"fusion second {verb} that nothing is so; this fails at any node"):
        run(monkeypatch, fired=0, **{verb: (NEVER,)})


def test_claims_are_not_checked_after_a_partial_pass(monkeypatch) -> None:
    """The gate on counts refuses that graph, unless its user allows it."""
    rules = run(monkeypatch, fired=1, requires=(NEVER,), ensures=(NEVER,))
    assert [rule.passed for rule in rules] == [False, False]


@pytest.mark.parametrize("pipelines", [PIPELINES, STATIC_PIPELINES], ids=["dynamic", "static"])
@pytest.mark.parametrize("target", PIPELINES)
def test_every_pass_requires_and_ensures_something(target, pipelines) -> None:
    for fusion in pipelines.get(target, ()):
        assert fusion.requires, fusion.rule
        assert fusion.ensures, fusion.rule
