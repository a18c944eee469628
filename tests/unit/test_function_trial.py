"""Which functions of the user's own a graph can hold.

A traced call stands in for a CUDA graph: it repeats the operations of one call, repeats no Python,
and has no values that the host could read.
"""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from vllm.ensemble_decode.functions import make_function
from vllm.ensemble_decode.ops import combine
from vllm.ensemble_decode.trial import Captured, obstacle_to_capture

CPU = torch.device("cpu")


def traced(call):
    output = call()
    graph = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)()
    return Captured(lambda: output.copy_(graph()), output)


@pytest.mark.parametrize("combines_probs", [True, False])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sharper", None),
        ("by_margin", None),
        ("reads_on_the_host", "it cannot be captured ("),
        ("counts_its_calls", "its results in a graph differ from those of calls"),
        ("mixes_rows", "the result of a row depends on other rows"),
        ("never", "it declares itself not capturable"),
    ],
)
def test_a_function_is_tried(name, reason, combines_probs):
    function = make_function(f"own_functions:{name}", 2, {})
    found = obstacle_to_capture(function, 50, combines_probs, CPU, traced)
    assert found is None if reason is None else found.startswith(reason)
    assert found is None or "\n" not in found


def test_a_declared_function_is_captured_and_not_compared():
    function = make_function("own_functions:declared", 2, {})
    captured = []

    def counted(call):
        captured.append(call)
        return Captured(pytest.fail, torch.empty(0))

    assert obstacle_to_capture(function, 50, True, CPU, counted) is None
    assert len(captured) == 1


def test_coefficients_by_row():
    scores = torch.tensor([[[4.0, 0.0, 0.0], [1.0, 1.1, 1.0]], [[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]])
    found = combine(make_function("own_functions:by_margin", 2, {}), scores, False)
    expected = [[4.0, 0.0, 0.0], [0.5, 0.55, 1.5]]
    torch.testing.assert_close(found, torch.tensor(expected))
    with pytest.raises(ValueError, match=r"row coefficients of shape \[2\]; it must be \[2, 2\]"):
        combine(make_function("own_functions:wrong_shape", 2, {}), scores, False)
