"""A state that is loaded into an optimizer of another kind: converted, or one error that says why."""

import itertools

import kinds_ranks
import pytest
from kept_ranks import run_ranks

FORMATS = ["float32", "bfloat16", "int8", "int4"]
PAIRS = [*itertools.product(FORMATS, FORMATS)]
COPIED = {("bfloat16", "float32"), *zip(FORMATS, FORMATS, strict=True)}  # without a conversion
LOSSLESS = COPIED | {("int8", "float32"), ("int4", "float32"), ("int4", "int8")}
ALONE = [way for way in kinds_ranks.WAYS if way != "set, full, from rank 0"]
ON_RANKS = [("fsdp2", way) for way in kinds_ranks.WAYS if way != "dcp, full"]
ON_RANKS += [("tp", "dcp"), ("tp", "set, full"), ("hsdp", "dcp, flat")]


def found(sharding, way, tmp_path, cases, dtype="float32"):
    """What every rank says of each case."""
    if sharding == "one":
        return [[text] for text in kinds_ranks.outcomes("one", way, str(tmp_path), cases, dtype)]
    ranks = run_ranks(
        kinds_ranks.outcomes, 4 if sharding == "hsdp" else 2, sharding, way, str(tmp_path), cases, dtype
    )
    return list(zip(*ranks, strict=True))


def refused(said, option, way):
    """Whether every rank has an error that says the option; of what older versions saved, any error."""
    if way == "dcp, without markers" and all("Size mismatch" in text for text in said):
        return True
    if "from rank 0" in way and all("must match the size of tensor" in text for text in said):
        return True  # torch copies what it broadcasts before NovoGrad sees it, and says this
    named = all(option in text and "Size mismatch" not in text for text in said)
    return named and all("Error: " in text or "Exception: " in text for text in said)


@pytest.mark.parametrize(("sharding", "way"), [*(("one", way) for way in ALONE), *ON_RANKS])
def test_another_momentum_dtype_is_converted_without_loss_or_refused_by_name(sharding, way, tmp_path):
    cases = [({"momentum_dtype": a}, {"momentum_dtype": b}) for a, b in PAIRS]
    converts = way in ("set", "set, full")
    for pair, said in zip(PAIRS, found(sharding, way, tmp_path, cases), strict=True):
        if pair in COPIED or (converts and pair in LOSSLESS):
            assert set(said) == {"the same"}, (pair, said)
        else:
            converted = pair in LOSSLESS and set(said) == {"the same"}
            assert converted or refused(said, "momentum_dtype", way), (pair, said)


# Options, others, and which of them an error has to say.
KINDS = [
    ({}, {"preset": "adamw"}, "granularity"),
    ({"preset": "adamw"}, {}, "granularity"),
    ({}, {"granularity": "row"}, "granularity"),
    ({"bias_correction": True}, {}, "bias_correction"),
    ({}, {"bias_correction": True}, "bias_correction"),
    ({"betas": (0.0, 0.98)}, {}, "betas"),
    ({}, {"betas": (0.0, 0.98)}, "betas"),
]


@pytest.mark.parametrize(
    ("sharding", "way"),
    [*(("one", way) for way in ALONE), *(("fsdp2", way) for way in ("dcp", "dcp, flat", "set, flat"))],
)
def test_other_layers_counts_or_betas_are_taken_over_or_refused_by_name(sharding, way, tmp_path):
    for case, said in zip(KINDS, found(sharding, way, tmp_path, [c[:2] for c in KINDS]), strict=True):
        taken_over = case[2] != "granularity" and set(said) == {"the same"}
        assert taken_over or refused(said, case[2], way), (case, said)


@pytest.mark.parametrize("way", ["dcp", "dcp, flat", "dcp, without markers", "set, flat"])
def test_counts_of_what_rounds_bfloat16_weights_do_not_begin_anew(way, tmp_path):
    options = {"stochastic_rounding": False}, {"stochastic_rounding": True}
    without, lost = found("one", way, tmp_path, [options, options[::-1]], "bfloat16")
    assert refused(lost, "stochastic_rounding", way)
    assert refused(without, "stochastic_rounding", way) or way in ("dcp, without markers", "set, flat")
